#include "artifact.h"

#include <array>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "errors.h"
#include "sha256.h"

namespace esper {
namespace {

namespace fs = std::filesystem;

constexpr size_t kLocal = 30, kCentral = 46, kEnd = 22;  // zip's headers, without names
constexpr const char* kAgain = "; fetch it again, or compile the blueprint again";

struct Part {
  std::string_view name;
  uint64_t cap;
  bool is_elf;
};
using Parts = std::array<Part, 4>;
constexpr Part kManifest{"manifest.json", kMaxManifest, false};
constexpr Part kBlueprint{"blueprint.json", kMaxBlueprint, false};
constexpr Parts kLibraries{{kManifest, kBlueprint,
                            {"forward.so", kMaxLibrary, true}, {"backward.so", kMaxLibrary, true}}};
constexpr Parts kCubins{{kManifest, kBlueprint,
                         {"plan.json", kMaxPlan, false}, {"kernels.cubin", kMaxCubins, true}}};
const Parts& PartsOf(Layout layout) {
  return layout == Layout::kCubins ? kCubins : kLibraries;
}
std::string_view& Place(Members& members, size_t i) {
  return i == 0 ? members.manifest : i == 1 ? members.blueprint : members.code[i - 2];
}
constexpr uint64_t kMaxArtifact = kMaxManifest + kMaxBlueprint + 2 * kMaxLibrary + (1 << 16);

[[noreturn]] void Corrupt(const std::string& what) { throw ArtifactCorrupt(what + kAgain); }

// Takes bytes from the front of what is left; refuses to go beyond the end.
class Reader {
 public:
  explicit Reader(std::string_view left) : left_(left) {}

  std::string_view Take(uint64_t size, const char* what) {
    if (size > left_.size()) Corrupt(std::string("the file ends within ") + what);
    const std::string_view taken = left_.substr(0, size);
    left_.remove_prefix(size);
    return taken;
  }
  bool Starts(std::string_view text) const { return left_.substr(0, text.size()) == text; }
  bool empty() const { return left_.empty(); }

 private:
  std::string_view left_;
};

// A little-endian number of `width` bytes at `offset`; the caller knows that they are there.
uint64_t Number(std::string_view bytes, size_t offset, size_t width) {
  uint64_t value = 0;
  for (size_t i = 0; i < width; ++i) {
    value |= uint64_t{static_cast<unsigned char>(bytes[offset + i])} << (8 * i);
  }
  return value;
}

void Need(bool holds, std::string_view member, const char* what) {
  if (!holds) Corrupt("the zip's headers of " + std::string(member) + ": " + what);
}

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  const int fd_;
};

[[noreturn]] void Fail(const std::string& doing) {
  throw std::system_error(errno, std::generic_category(), doing);
}

std::string ReadFile(const std::string& path) {
  // O_NONBLOCK: opening a FIFO that somebody left at this path must not hang.
  const FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat status;
  if (file.get() < 0 || fstat(file.get(), &status) != 0) Fail("cannot open " + path);
  if (!S_ISREG(status.st_mode)) {
    throw ArtifactCorrupt(path + ": not a plain file; an artifact is one zip file");
  }
  const auto size = static_cast<uint64_t>(status.st_size);
  if (size > kMaxArtifact) {
    throw ArtifactCorrupt(path + ": " + std::to_string(size) + " bytes, an artifact has at most " +
                          std::to_string(kMaxArtifact));
  }
  std::string content(size + 1, '\0');  // one more, to notice a file that grows meanwhile
  size_t filled = 0;
  while (filled < content.size()) {
    const ssize_t n = read(file.get(), content.data() + filled, content.size() - filled);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) Fail("cannot read " + path);
    if (n == 0) break;
    filled += static_cast<size_t>(n);
  }
  if (filled != size) {
    throw ArtifactCorrupt(path + ": the file changed while it was read; try again");
  }
  content.resize(size);
  return content;
}

// A folder of this user's alone, gone with its owner. Not a memfd: the dynamic linker takes a
// library whose path it has seen before for the same library, and /proc/self/fd/N comes round
// again.
class PrivateFolder {
 public:
  PrivateFolder() : path_((fs::temp_directory_path() / "esper-kernel-XXXXXX").string()) {
    if (mkdtemp(path_.data()) == nullptr) Fail("cannot make a folder " + path_);
  }
  PrivateFolder(const PrivateFolder&) = delete;
  PrivateFolder& operator=(const PrivateFolder&) = delete;
  ~PrivateFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }

  std::string Write(const std::string& name, std::string_view content) const {
    const std::string path = path_ + "/" + name;
    const FileDescriptor file(
        open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, S_IRUSR | S_IWUSR));
    if (file.get() < 0) Fail("cannot make " + path);
    while (!content.empty()) {
      const ssize_t n = write(file.get(), content.data(), content.size());
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) Fail("cannot write " + path);
      content.remove_prefix(static_cast<size_t>(n));
    }
    return path;
  }

 private:
  std::string path_;
};

// The CRC-32 of zip (polynomial 0xedb88320), for a few kilobytes: bit by bit is fast enough.
uint32_t Checksum(std::string_view bytes) {
  uint32_t crc = ~uint32_t{0};
  for (const char byte : bytes) {
    crc ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0xedb88320u & -(crc & 1));
  }
  return ~crc;
}

std::string Digest(std::string_view bytes) {
  return Sha256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
}

std::string CheckedDigest(const std::string& file, const std::string& path,
                          const std::string& expected) {
  std::string found = Digest(file);
  if (found != expected) {
    Corrupt(path + ": the SHA-256 is " + found + ", expected " + expected +
            "; the file is damaged or another one");
  }
  return found;
}

Members ParseNamed(const std::string& file, const std::string& path) {
  try {
    return ParseArtifact(file);
  } catch (const ArtifactCorrupt& e) {
    throw ArtifactCorrupt(path + ": " + e.what());
  }
}

}  // namespace

std::array<std::string_view, 4> Members::names() const {
  const Parts& parts = PartsOf(layout);
  return {parts[0].name, parts[1].name, parts[2].name, parts[3].name};
}

Members ParseArtifact(std::string_view file) {
  Members members;
  std::array<uint64_t, 4> offsets{};
  Reader reader(file);
  uint64_t offset = 0;
  for (size_t i = 0; i < offsets.size(); ++i) {
    offsets[i] = offset;
    const auto header = reader.Take(kLocal, "a header");
    // The third name says which layout it is.
    if (i == 2 && reader.Starts(kCubins[i].name)) members.layout = Layout::kCubins;
    const Part& part = PartsOf(members.layout)[i];
    Need(Number(header, 0, 4) == 0x04034b50, part.name, "no member begins here");
    // Encryption, sizes that follow the data, and compression are all left out of artifacts.
    Need(Number(header, 6, 2) == 0 && Number(header, 8, 2) == 0, part.name,
         "flags or compression; artifacts are stored as they are");
    const uint64_t size = Number(header, 22, 4);
    Need(Number(header, 18, 4) == size && size <= part.cap, part.name, "size over the limit");
    Need(Number(header, 26, 2) == part.name.size() && Number(header, 28, 2) == 0, part.name,
         "another name or an extra field");
    Need(reader.Take(part.name.size(), "a name") == part.name, part.name, "another name");
    Place(members, i) = reader.Take(size, "a member");
    offset += kLocal + part.name.size() + size;
  }
  const Parts& parts = PartsOf(members.layout);
  const uint64_t directory = offset;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    const auto header = reader.Take(kCentral, "the directory");
    const uint64_t size = Place(members, i).size();
    Need(Number(header, 0, 4) == 0x02014b50 && Number(header, 8, 2) == 0 &&
             Number(header, 10, 2) == 0 && Number(header, 20, 4) == size &&
             Number(header, 24, 4) == size && Number(header, 28, 2) == part.name.size() &&
             Number(header, 30, 2) == 0 && Number(header, 32, 2) == 0 &&
             Number(header, 42, 4) == offsets[i] &&
             reader.Take(part.name.size(), "a name") == part.name,
         part.name, "the directory contradicts the member");
    if (i == 0) {
      Need(Number(header, 16, 4) == Checksum(members.manifest), part.name,
           "the checksum does not fit the content");
    }
    offset += kCentral + part.name.size();
  }
  const auto end = reader.Take(kEnd, "its end record");
  if (Number(end, 0, 4) != 0x06054b50 || Number(end, 4, 4) != 0 ||
      Number(end, 8, 2) != parts.size() || Number(end, 10, 2) != parts.size() ||
      Number(end, 12, 4) != offset - directory || Number(end, 16, 4) != directory ||
      Number(end, 20, 2) != 0 || !reader.empty()) {
    Corrupt("the zip's end record contradicts what is before it, or something follows");
  }
  for (size_t i = 2; i < parts.size(); ++i) {
    if (parts[i].is_elf && Place(members, i).substr(0, 4) != "\x7f" "ELF") {
      Corrupt(std::string(parts[i].name) + " is not an ELF file");
    }
  }
  return members;
}

Artifact::Artifact(std::string content, const std::string& path, const std::string& digest)
    : file(std::move(content)),
      digest(CheckedDigest(file, path, digest)),
      members(ParseNamed(file, path)),
      digests{Digest(members.blueprint), Digest(members.code[0]), Digest(members.code[1])} {}

std::shared_ptr<const Artifact> ReadArtifact(const std::string& path, const std::string& digest) {
  return std::make_shared<const Artifact>(ReadFile(path), path, digest);
}

namespace {

c10::intrusive_ptr<SeedKernel> OpenLibraries(const Members& members,
                                             const Convention& convention) {
  const PrivateFolder folder;
  // Once mapped, the files are not needed.
  return c10::make_intrusive<SeedKernel>(
      folder.Write("forward.so", members.code[0]), folder.Write("backward.so", members.code[1]),
      convention.backward_inputs, convention.gradients, convention.device, convention.dtype,
      convention.shapes);
}

c10::intrusive_ptr<SeedKernel> OpenCubins(const Members& members, const Convention& convention) {
  const auto plan = std::make_shared<const LaunchPlan>(*convention.plan);
  return OpenPlan(plan, LoadCubins(*plan, members.code[1]), convention.backward_inputs,
                  convention.gradients, convention.device, convention.dtype, convention.shapes);
}

}  // namespace

c10::intrusive_ptr<SeedKernel> OpenArtifact(const Artifact& artifact,
                                            const Convention& convention) {
  const Members& members = artifact.members;
  const bool cubins = members.layout == Layout::kCubins;
  TORCH_CHECK_VALUE(cubins == convention.plan.has_value(), "the artifact is made of ",
                    cubins ? "cubins" : "libraries", ", and ",
                    cubins ? "no launch plan was given" : "a launch plan was given",
                    "; give the plan where there are cubins");
  auto kernel = cubins ? OpenCubins(members, convention) : OpenLibraries(members, convention);
  kernel->papers = {std::string(members.manifest), std::string(members.blueprint),
                    members.code[0].size() + members.code[1].size()};
  return kernel;
}

}  // namespace esper
