/* A prefill/decode backend that answers at once, for measuring what stands in front of it.
 *
 * One thread, epoll, no locks: a request costs it under 20 us, so that on two cores the backend
 * does not take the CPU that is being measured. It looks like a vLLM API server to a router:
 *
 *   POST on the prefill port   one JSON answer carrying `kv_transfer_params`, shaped like NIXL's
 *                              (block ids in proportion to the prompt); an SGLang-style router,
 *                              which streams from the prefill server, gets a one-token stream
 *   POST on the decode port    `max_tokens` tokens, as one JSON answer or as server-sent events:
 *                              one chunk and one write() per token, per stream, per tick
 *   GET anything               200 and a small JSON object (health, models, server info)
 *
 * A tick is one engine step of all running streams (--tick-us; 0: tokens go out back to back).
 * Streams take their first token with the tick after their arrival, as in a real engine.
 *
 * usage: mock_backend --prefill-port P --decode-port D [--decode-port D2] [--tick-us N] [--dump]
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum { MAX_FDS = 65536, MAX_PORTS = 8, MAX_HEADER = 32768, CHARS_PER_BLOCK = 160 /* 32 ids of 4 digits + comma */ };

typedef struct {
    int fd;
    int is_prefill;
    char *in;
    size_t in_len, in_cap;
    char *out; /* bytes the socket did not take yet */
    size_t out_len, out_cap;
    int tokens_left; /* of a stream in progress */
    int headers_due;
    int close_after;
    int live_slot; /* index in `live`, -1 when no stream runs */
} Conn;

static Conn *conns[MAX_FDS];
static Conn *live[MAX_FDS];
static int num_live;
static enum { NEITHER, PREFILL, DECODE } listener_role[MAX_FDS];
static int epoll_fd, tick_us, dump;
static char sse_chunk[512], sse_last[640];
static size_t sse_chunk_len, sse_last_len;

static const char STREAM_HEADERS[] =
    "HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    "transfer-encoding: chunked\r\n\r\n";

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void build_chunks(void) {
    char event[400];
    const char *fmt =
        "data: {\"id\":\"cmpl-0123456789abcdef0123456789abcdef\",\"object\":\"text_completion\","
        "\"created\":1790000000,\"model\":\"mock\",\"choices\":[{\"index\":0,\"text\":\" token\","
        "\"logprobs\":null,\"finish_reason\":%s,\"stop_reason\":null,\"token_ids\":null}],"
        "\"usage\":null}\n\n";
    int n = snprintf(event, sizeof event, fmt, "null");
    sse_chunk_len = (size_t)snprintf(sse_chunk, sizeof sse_chunk, "%x\r\n%s\r\n", n, event);
    n = snprintf(event, sizeof event, fmt, "\"length\"");
    sse_last_len = (size_t)snprintf(sse_last, sizeof sse_last,
                                    "%x\r\n%s\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n", n, event);
}

static void watch(Conn *c, int want_write) {
    struct epoll_event ev = {.events = EPOLLIN | (want_write ? EPOLLOUT : 0), .data.fd = c->fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &ev);
}

static void leave_live(Conn *c) {
    if (c->live_slot < 0) return;
    Conn *moved = live[--num_live];
    live[c->live_slot] = moved;
    moved->live_slot = c->live_slot;
    c->live_slot = -1;
}

static void drop(Conn *c) {
    leave_live(c);
    conns[c->fd] = NULL;
    close(c->fd);
    free(c->in);
    free(c->out);
    free(c);
}

/* Returns 0 when the connection is gone. */
static int put(Conn *c, const char *data, size_t len) {
    if (c->out_len == 0) {
        ssize_t n = send(c->fd, data, len, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) {
            drop(c);
            return 0;
        }
        if (n > 0) {
            data += n;
            len -= (size_t)n;
        }
        if (len == 0) return 1;
        watch(c, 1);
    }
    if (c->out_len + len > c->out_cap) {
        c->out_cap = (c->out_len + len) * 2;
        c->out = realloc(c->out, c->out_cap);
    }
    memcpy(c->out + c->out_len, data, len);
    c->out_len += len;
    return 1;
}

static int flush_out(Conn *c) {
    ssize_t n = send(c->fd, c->out, c->out_len, MSG_NOSIGNAL);
    if (n < 0) {
        if (errno == EAGAIN) return 1;
        drop(c);
        return 0;
    }
    memmove(c->out, c->out + n, c->out_len - (size_t)n);
    c->out_len -= (size_t)n;
    if (c->out_len == 0) watch(c, 0);
    return 1;
}

static int put_json(Conn *c, const char *body, size_t len) {
    static char *answer;
    static size_t cap;
    if (len + 256 > cap) answer = realloc(answer, cap = len + 256);
    int n = sprintf(answer,
                    "HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: application/json\r\n"
                    "content-length: %zu\r\n\r\n", len);
    memcpy(answer + n, body, len);
    return put(c, answer, (size_t)n + len);
}

static const char *field(const char *body, size_t len, const char *name) {
    const char *at = memmem(body, len, name, strlen(name));
    if (!at) return NULL;
    at += strlen(name);
    while (at < body + len && (*at == ' ' || *at == ':')) at++;
    return at < body + len ? at : NULL;
}

static int put_completion(Conn *c, int num_tokens, size_t num_prompt_chars) {
    static char body[65536];
    int n = sprintf(body,
                    "{\"id\":\"cmpl-0123456789abcdef0123456789abcdef\",\"object\":\"text_completion\","
                    "\"created\":1790000000,\"model\":\"mock\",\"choices\":[{\"index\":0,\"text\":\"");
    for (int i = 0; i < num_tokens && n < 8000; i++) n += sprintf(body + n, " token");
    n += sprintf(body + n,
                 "\",\"logprobs\":null,\"finish_reason\":\"length\",\"stop_reason\":null}],"
                 "\"usage\":{\"prompt_tokens\":1000,\"total_tokens\":%d,\"completion_tokens\":%d}",
                 1000 + num_tokens, num_tokens);
    if (c->is_prefill) {
        size_t num_blocks = num_prompt_chars / CHARS_PER_BLOCK + 1;
        n += sprintf(body + n,
                     ",\"kv_transfer_params\":{\"do_remote_prefill\":true,\"do_remote_decode\":false,"
                     "\"remote_engine_id\":\"00000000-0000-0000-0000-000000000000\","
                     "\"remote_request_id\":\"cmpl-0123456789abcdef-0\",\"remote_host\":\"127.0.0.1\","
                     "\"remote_port\":5801,\"tp_size\":1,\"remote_block_ids\":[[");
        for (size_t i = 0; i < num_blocks && n < 60000; i++)
            n += sprintf(body + n, "%s%zu", i ? "," : "", 1000 + i);
        n += sprintf(body + n, "]]}");
    }
    n += sprintf(body + n, "}");
    return put_json(c, body, (size_t)n);
}

static int put_next_token(Conn *c) {
    char block[2048];
    size_t len = 0;
    if (c->headers_due) {
        memcpy(block, STREAM_HEADERS, sizeof STREAM_HEADERS - 1);
        len = sizeof STREAM_HEADERS - 1;
        c->headers_due = 0;
    }
    int is_last = --c->tokens_left == 0;
    memcpy(block + len, is_last ? sse_last : sse_chunk, is_last ? sse_last_len : sse_chunk_len);
    len += is_last ? sse_last_len : sse_chunk_len;
    if (is_last) leave_live(c);
    return put(c, block, len);
}

static int answer(Conn *c, const char *head, const char *body, size_t body_len) {
    if (dump) fprintf(stderr, "---- %s\n%.600s\n%.600s\n", c->is_prefill ? "P" : "D", head, body);
    if (strncmp(head, "GET", 3) == 0) {
        static const char info[] =
            "{\"object\":\"list\",\"status\":\"ok\",\"data\":[{\"id\":\"mock\",\"object\":\"model\","
            "\"owned_by\":\"mock\",\"max_model_len\":131072}]}";
        return put_json(c, info, sizeof info - 1);
    }
    const char *tokens = field(body, body_len, "\"max_tokens\"");
    const char *stream = field(body, body_len, "\"stream\"");
    int num_tokens = tokens ? atoi(tokens) : 16;
    if (c->is_prefill || num_tokens < 1) num_tokens = 1;
    if (!stream || *stream != 't') return put_completion(c, num_tokens, body_len);
    c->tokens_left = num_tokens;
    c->headers_due = 1;
    if (tick_us == 0) {
        while (c->tokens_left > 0)
            if (!put_next_token(c)) return 0;
        return 1;
    }
    c->live_slot = num_live;
    live[num_live++] = c;
    return 1;
}

/* Takes whole requests off the input buffer. Returns 0 when the connection is gone. */
static int parse(Conn *c) {
    for (;;) {
        if (c->in_len == 0) return 1;
        char *end = memmem(c->in, c->in_len < MAX_HEADER ? c->in_len : MAX_HEADER, "\r\n\r\n", 4);
        if (!end) return 1;
        *end = 0;
        size_t head_len = (size_t)(end - c->in) + 4, body_len = 0;
        const char *cl = strcasestr(c->in, "\ncontent-length:");
        if (cl) body_len = strtoul(cl + 16, NULL, 10);
        else if (strcasestr(c->in, "\ntransfer-encoding:")) {
            fprintf(stderr, "mock_backend: a chunked request body; not understood\n");
            drop(c);
            return 0;
        }
        if (c->in_len < head_len + body_len) {
            *end = '\r';
            if (head_len + body_len + 1 > c->in_cap) {
                c->in_cap = head_len + body_len + 1;
                c->in = realloc(c->in, c->in_cap);
            }
            return 1;
        }
        size_t used = head_len + body_len;
        if (!answer(c, c->in, c->in + head_len, body_len)) return 0;
        memmove(c->in, c->in + used, c->in_len - used);
        c->in_len -= used;
    }
}

static void on_readable(Conn *c) {
    for (;;) {
        if (c->in_len + 1 >= c->in_cap) {
            c->in_cap = c->in_cap ? c->in_cap * 2 : 16384;
            c->in = realloc(c->in, c->in_cap);
        }
        size_t room = c->in_cap - c->in_len - 1;
        ssize_t n = recv(c->fd, c->in + c->in_len, room, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN)) {
            drop(c);
            return;
        }
        if (n < 0) return;
        c->in_len += (size_t)n;
        c->in[c->in_len] = 0;
        if (!parse(c)) return;
        if ((size_t)n < room) return;
    }
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(fd, (void *)&at, sizeof at) || listen(fd, 4096)) die("listen");
    struct epoll_event ev = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &ev);
    return fd;
}

int main(int argc, char **argv) {
    int prefill_port = 0, decode_ports[MAX_PORTS], num_decode_ports = 0;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--prefill-port")) prefill_port = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--decode-port") && num_decode_ports < MAX_PORTS)
            decode_ports[num_decode_ports++] = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--tick-us")) tick_us = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--dump")) dump = 1;
        else return fprintf(stderr, "unknown argument %s\n", argv[i]), 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    build_chunks();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    int tick_fd = -1;
    listener_role[listen_on(prefill_port)] = PREFILL;
    for (int i = 0; i < num_decode_ports; i++) listener_role[listen_on(decode_ports[i])] = DECODE;
    if (tick_us) {
        tick_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
        struct timespec step = {tick_us / 1000000, (tick_us % 1000000) * 1000L};
        struct itimerspec every = {.it_interval = step, .it_value = step};
        timerfd_settime(tick_fd, 0, &every, NULL);
        struct epoll_event ev = {.events = EPOLLIN, .data.fd = tick_fd};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, tick_fd, &ev);
    }
    struct epoll_event events[512];
    for (;;) {
        int n = epoll_wait(epoll_fd, events, 512, -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == tick_fd) {
                uint64_t missed;
                if (read(tick_fd, &missed, 8) != 8) continue;
                /* Backwards: a finished stream's slot is taken by the last one, already served. */
                for (int s = num_live - 1; s >= 0; s--) put_next_token(live[s]);
            } else if (listener_role[fd]) {
                int new_fd, on = 1;
                while ((new_fd = accept4(fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
                    if (new_fd >= MAX_FDS) die("too many connections");
                    setsockopt(new_fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                    Conn *c = calloc(1, sizeof *c);
                    c->fd = new_fd;
                    c->is_prefill = listener_role[fd] == PREFILL;
                    c->live_slot = -1;
                    conns[new_fd] = c;
                    struct epoll_event ev = {.events = EPOLLIN, .data.fd = new_fd};
                    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, new_fd, &ev);
                }
            } else if (conns[fd]) {
                if (events[i].events & EPOLLOUT && !flush_out(conns[fd])) continue;
                if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) on_readable(conns[fd]);
            }
        }
    }
}
