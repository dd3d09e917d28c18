// A compiler that goes wild: `misbehave HOW`.
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void Try(int family, const struct sockaddr* to, socklen_t size, const char* what) {
  int fd = socket(family, SOCK_STREAM, 0);
  if (fd < 0 || connect(fd, to, size) != 0) {
    perror(what);
  } else {
    printf("%s: connected\n", what);
  }
}

int main(int count, char** given) {
  const char* how = count > 1 ? given[1] : "";
  if (!strcmp(how, "crash")) abort();
  if (!strcmp(how, "hang")) for (;;) pause();
  // Slow enough that a test machine on which nothing but the owner holds it survives it.
  for (int n = 0; !strcmp(how, "fork") && n < 3000; ++n, usleep(2000)) {
    if (fork() == 0) {
      setsid();
      for (;;) pause();
    }
  }
  // Never written to, so that it costs the test machine nothing.
  while (!strcmp(how, "eat")) {
    if (malloc(64 << 20) == NULL) {
      perror("cc1plus: virtual memory exhausted");
      return 1;
    }
  }
  if (!strcmp(how, "write")) {
    static char block[1 << 20];
    FILE* file = fopen("endless.o", "w");
    while (file != NULL) fwrite(block, sizeof block, 1, file);
    perror("endless.o");
    return 1;
  }
  if (!strcmp(how, "connect")) {
    struct sockaddr_in port = {.sin_family = AF_INET, .sin_port = htons(atoi(given[2]))};
    inet_pton(AF_INET, "127.0.0.1", &port.sin_addr);
    Try(AF_INET, (struct sockaddr*)&port, sizeof port, "the port");
    struct sockaddr_un path = {.sun_family = AF_UNIX};
    strncpy(path.sun_path, given[3], sizeof path.sun_path - 1);
    Try(AF_UNIX, (struct sockaddr*)&path, sizeof path, "the socket");
    fflush(stdout);
    return 1;
  }
  return 1;
}
