/*
 * The C ABI between the runtime, device drivers, transports and compiled programs. Little endian, 64-bit.
 * Every function returns 0 when all is well; otherwise the exit code that fits (1 the input is at fault, 3 a check or a peer failed,
 * 70 our fault) and error() gives one line for people.
 */
#ifndef STEP3_H
#define STEP3_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

#define S3_ABI 1u
#define S3_MAGIC 0x43335333u /* "3S3C" */

/* Pushed last with every exchange; each rank's row counts are read from here, on the device. */
typedef struct {
  uint32_t magic, abi, round, schedule, exchange, slot, rows, flags;
  uint64_t sequence;
  uint8_t zero[24];
} s3_head;

typedef struct { uint64_t mem, off, bytes; } s3_span;

/* Among the symbols of a schedule is no T. */
#define S3_NO_SYMBOL UINT32_MAX

/* One kernel launch. args are in the order of the schedule step: in, inout, out. heads: `segments` headers, one after another. */
typedef struct {
  uint32_t kernel, nargs;
  const s3_span *args;
  s3_span heads;
  uint32_t segments; /* row segments: attention ranks on the FFN side, 1 on the attention side */
  uint32_t stride;   /* maximum rows of one segment */
  s3_span dims;      /* int64_t values of the schedule's symbols, in their order, which the host writes between rounds */
  uint32_t rows_dim; /* the one of symbol T, or S3_NO_SYMBOL: whatever the host wrote, kernels find the rows of the first header there */
} s3_launch;

typedef struct { s3_span dst, src; } s3_copy; /* of one length */

typedef struct s3_dev s3_dev;
typedef struct s3_queue s3_queue;
typedef struct s3_segment s3_segment;
typedef uint64_t s3_event; /* 0: already happened */

/* Spans of this driver are addresses: one open device may use what another in the same process allocated (weights are loaded once). */
#define S3_DEVICE_SHARES_SPANS 1u
/* Devices of this driver copy into each other's memory in the order of their queues: the entries from map() on are there. */
#define S3_DEVICE_DIRECT 2u

/* The most bytes that share() writes: what only the same driver understands, or, for memory of the host, the following. */
#define S3_TOKEN 128u

/* A descriptor that another process can map, owned by the device. */
typedef struct {
  int32_t fd;
  uint32_t zero;
  uint64_t off, bytes; /* of the span, in the descriptor */
} s3_share;

/* A device driver, from s3_device_v1() in runtime/devices or in a plugin's library. Used by one thread at a time. */
typedef struct {
  uint32_t abi, caps;
  /* program: the compiled library of this side, options: device options as JSON ({"threads":2,"isa":"avx2","spin":2000,
     "kernels":{"k0_linear":4096},"exchange":"device"}: the kernels that the manifest has, and their scratch; shared memory is to be the
     device's own, for a transport of queues; "timing":true: elapsed() will be asked); what a driver does not know it ignores */
  int (*open)(int ordinal, const char *program, const char *options, s3_dev **);
  void (*close)(s3_dev *);
  int (*alloc)(s3_dev *, uint64_t bytes, uint64_t align, uint32_t shared, s3_span *); /* zeroed; shared: share() will be asked for it */
  void *(*host)(s3_dev *, s3_span);                                                   /* address, or NULL when the host cannot reach it */
  int (*queue)(s3_dev *, s3_queue **); /* the first is the one of read() and write(); direct: another at each further call, beside the others */
  int (*copy)(s3_queue *, s3_span dst, s3_span src, uint64_t bytes);
  int (*read)(s3_dev *, void *dst, s3_span src);
  int (*write)(s3_dev *, s3_span dst, const void *src);
  /* the launches between two communication steps; kernels are what kernel() gave; args are copied */
  int (*prepare)(s3_dev *, const s3_launch *, uint32_t n, s3_segment **);
  int (*submit)(s3_queue *, s3_segment *, s3_event *done); /* NULL: nobody asks */
  int (*wait)(s3_dev *, s3_event, uint32_t ms); /* 3: it has not happened within ms; 0 ms: without end */
  int (*share)(s3_dev *, s3_span, void *token, uint32_t *bytes); /* bytes: of token, in and out */
  int (*kernel)(s3_dev *, const char *name, uint32_t *index);
  const char *(*error)(s3_dev *); /* NULL device: why the last open on this thread failed */

  /* with S3_DEVICE_DIRECT */
  int (*map)(s3_dev *, const void *token, uint32_t bytes, uint32_t here, s3_span *out); /* what another device shares; here: one of this process */
  int (*mark)(s3_queue *, s3_event *done);                    /* happens when all that the queue was given has */
  int (*after)(s3_queue *, s3_event);                         /* the queue goes on when it has happened */
  int (*put)(s3_queue *, s3_span dst, const void *src);       /* write() on a queue, of a few bytes: they are taken before the call ends */
  int (*copies)(s3_dev *, const s3_copy *, uint32_t n, s3_segment **); /* each after the one before has arrived; 8 aligned bytes arrive as one */
  int (*await)(s3_queue *, s3_span flag, uint64_t sequence);  /* the queue goes on when the flag, in its device's memory, holds as much or more */
  int (*elapsed)(s3_dev *, s3_event from, s3_event to, int64_t *ns); /* between two that have happened, of the same round */
} s3_device;
const s3_device *s3_device_v1(void);

typedef struct s3_net s3_net;

/*
 * Ranks are numbered: attention ranks first, then FFN ranks.
 * One permanent pairing of memory on both sides (contract K1), bound before start() in posting order, the header last.
 */
typedef struct {
  uint64_t key;
  uint32_t schedule, slot;
  uint32_t peer;     /* rank number of the other side */
  uint32_t outgoing; /* 1: memory is read and sent; 0: the peer writes it */
  uint64_t types;    /* bit i: exchange type i of the schedule carries it */
  uint64_t row;      /* bytes of one row, so that only the rows that are there are moved; 0: the header, 64 bytes */
  s3_span memory;    /* bytes: of one message at its maximum, equal on both sides (contract K3) */
} s3_key;

/* One exchange on a slot. The same sequence on both sides, growing within a slot of a schedule. */
typedef struct {
  uint32_t schedule, exchange, type, slot;
  uint64_t sequence;
} s3_exchange;

/* What a rank wants of the next round: the schedule (index + 1, 0: nothing) with the highest priority that anyone wants is run. */
typedef struct {
  uint32_t schedule, priority;
  uint32_t abort; /* the user wants an end: all stop before the next round */
} s3_wish;
#define S3_STOP_DONE 1u
#define S3_STOP_ABORT 2u
typedef struct { uint32_t round, schedule, stop; } s3_round;

/* For devices that are direct: nothing of a round waits on the host but settle(). await() and accept() need the queue of the launches, post() and
   reply() return at once, and the host does not write headers into push sources. */
#define S3_TRANSPORT_QUEUES 1u

/*
 * A transport, from s3_transport_v1(). An exchange is posted to all FFN ranks, then waited for; on the other side accepted, then replied to.
 * open: config is JSON: {"attention":2,"ffn":1,"session":"name","schedules":[{"slots":3}],"spin":2000,"timeout_ms":30000,"leave_ms":1500}; what a
 * transport does not know it ignores. timeout_ms: for peers to appear. leave_ms: a process that still computes so long after a peer died is
 * ended with exit code 3 (0: never). ms: 0 waits for as long as the peers live.
 */
typedef struct {
  uint32_t abi, caps;
  int (*open)(const char *config, uint32_t rank, const uint8_t wire[32], s3_dev *, const s3_device *, s3_net **);
  int (*bind)(s3_net *, const s3_key *);
  int (*start)(s3_net *); /* compares hashes: a peer with another is refused, both named */
  int (*agree)(s3_net *, const s3_wish *mine, s3_round *out, uint32_t ms); /* all ranks, before each round */
  int (*post)(s3_net *, const s3_exchange *, const s3_head *, s3_event after); /* the header: what is pushed last */
  int (*await)(s3_net *, const s3_exchange *, s3_queue *, uint32_t ms); /* NULL queue: the host waits */
  int (*accept)(s3_net *, const s3_exchange *, uint32_t from, s3_queue *, uint32_t ms);
  int (*reply)(s3_net *, const s3_exchange *, uint32_t to, s3_event after);
  void (*close)(s3_net *, const char *why); /* why: what went wrong here, for the peers; NULL: all is done */
  const char *(*error)(s3_net *); /* NULL net: why the last open on this thread failed */
  int (*settle)(s3_net *, s3_queue *, uint32_t ms); /* with S3_TRANSPORT_QUEUES: the host waits for the queue to have done all of a round */
} s3_transport;
const s3_transport *s3_transport_v1(void);

/* --- programs for the `cpp` device ------------------------------------------------------------------------------------------ */

/* What a kernel gets, on each thread of the team. Rows of segment i are i*stride .. i*stride + heads[i].rows - 1. */
typedef struct s3_call {
  void *const *args;
  const s3_head *heads;
  uint32_t segments, stride;
  uint32_t thread, threads;
  void *scratch;                         /* shared by the team */
  void (*barrier)(const struct s3_call *); /* all threads of the team */
  const int64_t *dims;                   /* values of the graph's symbols, in their order; T's are the rows of the first segment */
} s3_call;
typedef void (*s3_kernel)(const s3_call *);

typedef struct {
  const char *name;
  uint64_t scratch;
  s3_kernel run;
} s3_kernel_entry;

typedef struct {
  uint32_t abi, count;
  const char *isa;
  const s3_kernel_entry *kernels;
} s3_program;

/* The program built for an instruction set: "baseline", "avx2", "avx512", "amx"; NULL name: the best this processor runs. NULL when it cannot. */
const s3_program *s3_program_v1(const char *isa);

#ifdef __cplusplus
}
#endif
#endif
