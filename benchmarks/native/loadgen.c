/* An HTTP load generator for one URL, small enough not to disturb what it measures.
 *
 * One thread, epoll, keep-alive connections, ordinary client sockets: TCP_NODELAY as Python's and
 * Rust's HTTP clients set it, no TCP_QUICKACK. A server that leaves Nagle's algorithm on is
 * therefore seen to lose the 40 ms of a delayed ACK, as its users see it.
 *
 *   closed loop   --concurrency C: every connection sends its next request when its answer ended
 *   open loop     --rate R: request i is due at (i + jitter) / R, jitter uniform in [0, 1) so that
 *                 arrivals never lock onto the backend's ticks; latency counts from the due time,
 *                 so a late start is the server's or the generator's delay, never hidden
 *
 * The body comes from a file. Marked bytes in it are replaced before each request, so that no two
 * prompts are equal: 0x01 a hex digit, 0x02 a decimal digit, 0x03 a decimal digit but 0.
 *
 * Answers are parsed as they stream: Content-Length or chunked; a line `data: ...` other than
 * [DONE] is one event. `first` is the read that completed the first event (of a plain answer: the
 * first body byte), `total` the end of the body, `gap` the longest silence before or between
 * events. One JSON line on stdout; --records FILE adds one CSV line per request.
 *
 * usage: loadgen --port P --path /v1/completions --body FILE (--concurrency C | --rate R)
 *                [--requests N] [--duration S] [--seed N] [--max-connections N] [--records FILE]
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
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
#include <time.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 4096, HEAD_CAP = 16384, LINE_KEPT = 16 };
static const double REQUEST_TIMEOUT_S = 120.0;

typedef enum { IDLE, BUSY } ConnState;
typedef enum { IN_HEAD, IN_BODY, IN_CHUNK_SIZE, IN_CHUNK, IN_CHUNK_END, IN_TRAILER } ParseState;

typedef struct {
    double due, first, last, end, gap;
    int status, events;
} Sample;

typedef struct {
    int fd;
    ConnState state;
    int idle_slot;
    char *request; /* head and body, contiguous, this connection's own copy */
    size_t sent;
    /* answer */
    ParseState parse;
    char head[HEAD_CAP];
    size_t head_len;
    int has_length, body_seen;
    size_t left; /* bytes of the body or of this chunk */
    char size_line[32];
    int size_len;
    char line[LINE_KEPT];
    size_t line_len;
    double last_mark;
    Sample sample;
    int num_served; /* on this TCP connection: a server may close a used one between requests */
} Conn;

static const char *path = "/v1/completions", *records_path;
static int port, num_connections, is_open_loop, epoll_fd;
static double rate, duration_s = 1e9;
static long num_requests = 1L << 40, num_issued, num_reconnects;
static size_t request_len, num_marks;
static char *request_template;
static size_t *marks;
static uint64_t random_state = 88172645463325252ull;

static Conn *conns;
static int idle[MAX_CONNECTIONS], num_idle, num_busy;
static Sample *samples;
static size_t num_samples, cap_samples;
static double *waiting; /* due times of open-loop requests for which no connection was free */
static size_t waiting_at, waiting_end, waiting_cap;
static int num_errors, error_shown;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t next_random(void) { /* xorshift64* */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 2685821657736338717ull;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void read_template(const char *file) {
    FILE *f = fopen(file, "rb");
    if (!f) die(file);
    fseek(f, 0, SEEK_END);
    size_t body_len = (size_t)ftell(f);
    rewind(f);
    char *body = malloc(body_len);
    if (fread(body, 1, body_len, f) != body_len) die("read body");
    fclose(f);
    request_template = malloc(body_len + 1024);
    int head_len = snprintf(request_template, 1024,
                            "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUser-Agent: loadgen\r\n"
                            "Accept: */*\r\nContent-Type: application/json\r\n"
                            "Content-Length: %zu\r\n\r\n", path, port, body_len);
    memcpy(request_template + head_len, body, body_len);
    request_len = (size_t)head_len + body_len;
    free(body);
    for (size_t i = 0; i < request_len; i++)
        if ((unsigned char)request_template[i] <= 3) {
            marks = realloc(marks, (num_marks + 1) * sizeof *marks);
            marks[num_marks++] = i;
        }
}

static void fill_marks(char *request) {
    uint64_t bits = 0;
    for (size_t i = 0; i < num_marks; i++) {
        if (i % 8 == 0) bits = next_random();
        unsigned v = bits & 255;
        bits >>= 8;
        char kind = request_template[marks[i]];
        request[marks[i]] = kind == 1   ? "0123456789abcdef"[v & 15]
                            : kind == 2 ? (char)('0' + v % 10)
                                        : (char)('1' + v % 9);
    }
}

static void connect_one(Conn *c) {
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (connect(c->fd, (void *)&to, sizeof to)) die("connect");
    int on = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &ev);
    c->num_served = 0;
}

static void watch(Conn *c, int want_write) {
    struct epoll_event ev = {.events = EPOLLIN | (want_write ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &ev);
}

static void make_idle(Conn *c) {
    c->state = IDLE;
    c->idle_slot = num_idle;
    idle[num_idle++] = (int)(c - conns);
}

static void finish(Conn *c, double at, int is_error);

static void pump(Conn *c) {
    while (c->sent < request_len) {
        ssize_t n = send(c->fd, c->request + c->sent, request_len - c->sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0) {
            if (errno == EAGAIN) {
                watch(c, 1);
                return;
            }
            return; /* the read side will see the reset */
        }
        c->sent += (size_t)n;
    }
}

static void issue(Conn *c, double due) {
    num_issued++;
    num_busy++;
    c->state = BUSY;
    c->sent = 0;
    c->parse = IN_HEAD;
    c->head_len = 0;
    c->body_seen = 0;
    c->line_len = 0;
    c->size_len = 0;
    c->sample = (Sample){.due = due};
    c->last_mark = due;
    fill_marks(c->request);
    pump(c);
}

static void mark_event(Conn *c, double at) {
    if (c->sample.events++ == 0) c->sample.first = at;
    if (at - c->last_mark > c->sample.gap) c->sample.gap = at - c->last_mark;
    c->last_mark = at;
    c->sample.last = at;
}

static void on_body(Conn *c, const char *data, size_t len, double at) {
    if (!c->body_seen) {
        c->body_seen = 1;
        c->sample.first = at;
        if (c->sample.status != 200 && error_shown < 3) {
            error_shown++;
            fprintf(stderr, "loadgen: status %d: %.*s\n", c->sample.status, (int)(len < 400 ? len : 400), data);
        }
    }
    while (len) {
        const char *nl = memchr(data, '\n', len);
        size_t part = nl ? (size_t)(nl - data) : len;
        for (size_t i = 0; i < part && c->line_len + i < LINE_KEPT; i++) c->line[c->line_len + i] = data[i];
        c->line_len += part;
        if (!nl) return;
        if (c->line_len >= 6 && !memcmp(c->line, "data:", 5) &&
            !(c->line_len >= 12 && !memcmp(c->line, "data: [DONE]", 12)))
            mark_event(c, at);
        c->line_len = 0;
        data = nl + 1;
        len -= part + 1;
    }
}

/* Returns 1 when the answer is complete, -1 when it makes no sense. */
static int parse(Conn *c, const char *data, size_t len, double at) {
    while (len) {
        switch (c->parse) {
        case IN_HEAD: {
            size_t take = len < HEAD_CAP - 1 - c->head_len ? len : HEAD_CAP - 1 - c->head_len;
            if (!take) return -1;
            size_t before = c->head_len;
            memcpy(c->head + before, data, take);
            c->head_len += take;
            c->head[c->head_len] = 0;
            char *end = memmem(c->head, c->head_len, "\r\n\r\n", 4);
            if (!end) {
                data += take;
                len -= take;
                break;
            }
            size_t used = (size_t)(end + 4 - c->head) - before;
            end[2] = 0;
            if (sscanf(c->head, "HTTP/1.%*d %d", &c->sample.status) != 1) return -1;
            const char *cl = strcasestr(c->head, "\ncontent-length:");
            if (cl) {
                c->left = strtoul(cl + 16, NULL, 10);
                c->parse = IN_BODY;
                if (c->left == 0) return 1;
            } else if (strcasestr(c->head, "\ntransfer-encoding: chunked")) {
                c->parse = IN_CHUNK_SIZE;
            } else {
                return -1;
            }
            data += used;
            len -= used;
            break;
        }
        case IN_BODY: {
            size_t take = len < c->left ? len : c->left;
            on_body(c, data, take, at);
            c->left -= take;
            if (c->left == 0) return len == take ? 1 : -1;
            data += take;
            len -= take;
            break;
        }
        case IN_CHUNK_SIZE:
            if (*data == '\n') {
                c->size_line[c->size_len] = 0;
                c->left = strtoul(c->size_line, NULL, 16);
                c->size_len = 0;
                c->parse = c->left ? IN_CHUNK : IN_TRAILER;
            } else if (c->size_len < 30) {
                c->size_line[c->size_len++] = *data;
            } else {
                return -1;
            }
            data++, len--;
            break;
        case IN_CHUNK: {
            size_t take = len < c->left ? len : c->left;
            on_body(c, data, take, at);
            c->left -= take;
            data += take;
            len -= take;
            if (c->left == 0) c->parse = IN_CHUNK_END;
            break;
        }
        case IN_CHUNK_END:
            if (*data == '\n') c->parse = IN_CHUNK_SIZE;
            data++, len--;
            break;
        case IN_TRAILER: /* an empty line ends it; size_len counts the line's characters */
            if (*data == '\n') {
                if (c->size_len == 0) return len == 1 ? 1 : -1;
                c->size_len = 0;
            } else if (*data != '\r') {
                c->size_len++;
            }
            data++, len--;
            break;
        }
    }
    return 0;
}

static void finish(Conn *c, double at, int is_error) {
    c->sample.end = at;
    if (is_error || c->sample.status != 200) num_errors++;
    if (is_error) c->sample.status = 0;
    if (num_samples == cap_samples) {
        cap_samples = cap_samples ? cap_samples * 2 : 65536;
        samples = realloc(samples, cap_samples * sizeof *samples);
    }
    samples[num_samples++] = c->sample;
    num_busy--;
    c->num_served++;
    make_idle(c);
}

static void reconnect(Conn *c) {
    close(c->fd);
    num_reconnects++;
    connect_one(c);
}

static void on_ready(Conn *c, uint32_t events) {
    if (events & EPOLLOUT) {
        watch(c, 0);
        pump(c);
    }
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
    char buffer[65536];
    ssize_t n = recv(c->fd, buffer, sizeof buffer, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return;
    double at = now_s();
    if (n <= 0) {
        int was_busy = c->state == BUSY;
        int can_retry = was_busy && c->num_served > 0 && c->head_len == 0;
        reconnect(c);
        if (can_retry) { /* a keep-alive connection closed under the request: any client resends */
            c->sent = 0;
            pump(c);
        } else if (was_busy) {
            if (error_shown++ < 3) fprintf(stderr, "loadgen: connection closed in an answer\n");
            finish(c, at, 1);
        }
        return;
    }
    if (c->state != BUSY) return;
    int done = parse(c, buffer, (size_t)n, at);
    if (done < 0) {
        if (error_shown++ < 3) fprintf(stderr, "loadgen: answer not understood: %.200s\n", c->head);
        reconnect(c);
        finish(c, at, 1);
    } else if (done) {
        finish(c, at, 0);
    }
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_percentiles(const char *name, double *v, size_t n) {
    qsort(v, n, sizeof *v, by_value);
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += v[i];
#define P(q) (n ? v[(size_t)((double)(n - 1) * (q) + 0.5)] * 1e3 : 0.0)
    printf(",\"%s_ms\":{\"mean\":%.4f,\"p50\":%.4f,\"p90\":%.4f,\"p99\":%.4f,\"max\":%.4f}", name,
           n ? sum / (double)n * 1e3 : 0.0, P(0.5), P(0.9), P(0.99), P(1.0));
}

int main(int argc, char **argv) {
    const char *body = NULL;
    int max_connections = 1024;
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *v = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(a, "--port")) port = atoi(v);
        else if (!strcmp(a, "--path")) path = v;
        else if (!strcmp(a, "--body")) body = v;
        else if (!strcmp(a, "--concurrency")) num_connections = atoi(v);
        else if (!strcmp(a, "--rate")) rate = atof(v), is_open_loop = 1;
        else if (!strcmp(a, "--requests")) num_requests = atol(v);
        else if (!strcmp(a, "--duration")) duration_s = atof(v);
        else if (!strcmp(a, "--max-connections")) max_connections = atoi(v);
        else if (!strcmp(a, "--seed")) random_state ^= strtoull(v, NULL, 10) * 0x9E3779B97F4A7C15ull;
        else if (!strcmp(a, "--records")) records_path = v;
        else return fprintf(stderr, "unknown argument %s\n", a), 2;
        i++;
    }
    if (!port || !body || (!num_connections && !is_open_loop)) return fprintf(stderr, "see the top of loadgen.c\n"), 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (is_open_loop) num_connections = max_connections;
    if (num_connections > MAX_CONNECTIONS) num_connections = MAX_CONNECTIONS;
    read_template(body);
    for (int i = 0; i < 16; i++) next_random();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    conns = calloc((size_t)num_connections, sizeof *conns);
    int num_open = is_open_loop ? 0 : num_connections;
    for (int i = 0; i < num_connections; i++) {
        conns[i].fd = -1;
        conns[i].request = NULL;
    }
    for (int i = 0; i < num_open; i++) {
        conns[i].request = memcpy(malloc(request_len), request_template, request_len);
        connect_one(&conns[i]);
        make_idle(&conns[i]);
    }
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer, &ev);

    double start = now_s(), deadline = start + duration_s, last_progress = start;
    long num_planned = 0;
    double next_due = start + (double)(next_random() >> 11) / 9007199254740992.0 / (rate ? rate : 1);
    size_t seen = 0;
    for (;;) {
        double now = now_s();
        if (is_open_loop) {
            while (next_due <= now && num_planned < num_requests && next_due < deadline) {
                if (waiting_end == waiting_cap) {
                    waiting_cap = waiting_cap ? waiting_cap * 2 : 1024;
                    waiting = realloc(waiting, waiting_cap * sizeof *waiting);
                }
                waiting[waiting_end++] = next_due;
                num_planned++;
                double jitter = (double)(next_random() >> 11) / 9007199254740992.0;
                next_due = start + ((double)num_planned + jitter) / rate;
            }
            while (waiting_at < waiting_end) {
                if (!num_idle && num_open < num_connections) {
                    Conn *c = &conns[num_open++];
                    c->request = memcpy(malloc(request_len), request_template, request_len);
                    connect_one(c);
                    make_idle(c);
                }
                if (!num_idle) break;
                issue(&conns[idle[--num_idle]], waiting[waiting_at++]);
            }
            int is_over = num_planned >= num_requests || next_due >= deadline;
            if (is_over && !num_busy && waiting_at == waiting_end) break;
            if (!is_over) {
                struct itimerspec at = {.it_value = {(time_t)next_due, (long)((next_due - (double)(time_t)next_due) * 1e9)}};
                timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
            }
        } else {
            while (num_idle && num_issued < num_requests && now < deadline) {
                issue(&conns[idle[--num_idle]], now_s());
            }
            if (!num_busy && (num_issued >= num_requests || now >= deadline)) break;
        }
        if (num_samples != seen) seen = num_samples, last_progress = now;
        if (num_busy && now - last_progress > REQUEST_TIMEOUT_S) {
            fprintf(stderr, "loadgen: %d requests without an answer for %.0f s\n", num_busy, REQUEST_TIMEOUT_S);
            num_errors += num_busy;
            break;
        }
        struct epoll_event events[512];
        int n = epoll_wait(epoll_fd, events, 512, 1000);
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr == NULL) {
                uint64_t ticks;
                if (read(timer, &ticks, 8) != 8) continue;
            } else {
                on_ready(events[i].data.ptr, events[i].events);
            }
        }
    }
    double wall = now_s() - start;

    long num_events = 0;
    size_t n = 0, num_stalls = 0;
    double *first = malloc((num_samples + 1) * sizeof *first), *total = malloc((num_samples + 1) * sizeof *total);
    double *gap = malloc((num_samples + 1) * sizeof *gap), *tpot = malloc((num_samples + 1) * sizeof *tpot);
    size_t num_tpot = 0;
    for (size_t i = 0; i < num_samples; i++) {
        Sample *s = &samples[i];
        num_events += s->events;
        if (s->status != 200) continue;
        double silence = s->events ? s->gap : s->end - s->due;
        num_stalls += silence > 1.0;
        first[n] = s->first - s->due;
        total[n] = s->end - s->due;
        gap[n++] = silence;
        if (s->events > 1) tpot[num_tpot++] = (s->last - s->first) / (s->events - 1);
    }
    printf("{\"wall_s\":%.6f,\"num_requests\":%zu,\"num_errors\":%d,\"num_reconnects\":%ld,\"num_events\":%ld,"
           "\"num_stalls\":%zu,\"requests_per_s\":%.3f,\"events_per_s\":%.3f",
           wall, n, num_errors, num_reconnects, num_events, num_stalls, (double)n / wall, (double)num_events / wall);
    print_percentiles("first", first, n);
    print_percentiles("total", total, n);
    print_percentiles("gap", gap, n);
    print_percentiles("tpot", tpot, num_tpot);
    printf("}\n");
    if (records_path) {
        FILE *f = fopen(records_path, "w");
        if (!f) die(records_path);
        fprintf(f, "due_s,first_s,last_s,end_s,gap_s,events,status\n");
        for (size_t i = 0; i < num_samples; i++) {
            Sample *s = &samples[i];
            fprintf(f, "%.6f,%.6f,%.6f,%.6f,%.6f,%d,%d\n", s->due - start, s->first - s->due, s->last - s->due,
                    s->end - s->due, s->gap, s->events, s->status);
        }
        fclose(f);
    }
    return 0;
}
