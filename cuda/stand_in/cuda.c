/* A CUDA driver without a device, for tests: the calls that dtr-cuda makes, on memory of the host.
 *
 *     cc -shared -fPIC -O1 -pthread -Wl,-soname,libcuda.so -o libcuda.so cuda.c
 *
 * What it models:
 *   - Every stream is a thread with a queue. A copy reads and writes memory when its turn comes, not
 *     when it is asked for: a missing event shows as wrong bytes.
 *   - Streams have no order but that of events: only non-blocking streams can be made, and the
 *     legacy default stream (handle 0) is one more such stream.
 *   - A call needs the right context on its thread, live handles of that context, and memory that is
 *     allocated when the copy runs; otherwise it fails as the driver does.
 *   - A failure that the driver calls sticky loses the device: its streams run dry, and every later
 *     call on it fails with that code. What frees something frees it all the same, and contexts can
 *     still be made current.
 *   - While a graph is captured, a thread in the default mode may neither wait nor pin memory.
 *
 * What it does not: kernels, graphs, peers, virtual memory, time.
 *
 * The functions `stand_in_*` are the tests' controls. They ask no context and are not counted.
 * Everything is guarded by one lock, and every change is broadcast.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum code {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    ILLEGAL_ADDRESS = 700,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_IMPLICIT = 906,
};

enum { DEVICES_MAX = 8, CONTEXTS_PUSHED_MAX = 16, CALLS_MAX = 64 };
enum { STREAM_NON_BLOCKING = 1, CAPTURE_MODE_GLOBAL = 0 };
static const size_t DEVICE_BYTES = (size_t)1 << 30;

struct event {
    struct context *context;
    uint64_t recorded, passed; /* how often it was recorded, and how often that was reached */
    int references;            /* its handle, and the operations that wait for or pass it */
    bool is_alive;
    struct event *next;
};

enum kind { COPY_DOWN, COPY_UP, COPY_WITHIN, FREE, PASS, WAIT, WRITE };

struct operation {
    enum kind kind;
    uintptr_t to, from;
    size_t bytes;
    struct event *event;
    uint64_t turn; /* which of the event's records is passed or waited for */
    struct operation *next;
};

struct stream {
    struct context *context;
    struct operation *first, **last;
    bool is_running; /* executes an operation that was taken off the queue */
    bool is_held, is_captured, is_ours, is_ending;
    struct stream *next;
};

struct context {
    int device;
    int retained;
    unsigned lost; /* the code of the failure that lost the device */
    struct stream *legacy;
};

struct range {
    uintptr_t start;
    size_t bytes;
    struct context *context;
    struct range *next;
};

struct call {
    const char *name;
    uint64_t calls;
    uint64_t fails_in; /* the n-th call from now fails, */
    uint64_t fails_for; /* and so do the next ones: so many in all */
    unsigned fails_with;
};

static pthread_mutex_t world = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct context contexts[DEVICES_MAX];
static struct stream *streams;
static struct event *events;
static struct range *allocations, *registrations;
static struct call calls[CALLS_MAX];
static bool is_initialized, are_copies_held;
static const char *held_call;
static int version = 12040, devices = 2;
static int contexts_retained, copies_delayed_by_us;
static uint64_t copies_run, bytes_copied, pageable_copies, failures, pages_fetched;
static size_t bytes_allocated, bytes_registered;

static _Thread_local struct context *pushed[CONTEXTS_PUSHED_MAX];
static _Thread_local int pushed_count;
static _Thread_local unsigned capture_mode = CAPTURE_MODE_GLOBAL;

static void lock_world(void)
{
    pthread_mutex_lock(&world);
}

static void unlock_world(void)
{
    pthread_mutex_unlock(&world);
}

/* A forked child may ask what was counted: no thread that it lacks may hold the lock. */
__attribute__((constructor)) static void survive_forks(void)
{
    pthread_atfork(lock_world, unlock_world, unlock_world);
}

/* -- Ranges of memory -------------------------------------------------------------------------- */

static bool touches(const struct range *range, uintptr_t start, size_t bytes)
{
    return start < range->start + range->bytes && range->start < start + bytes;
}

static bool holds(const struct range *range, uintptr_t start, size_t bytes)
{
    return range->start <= start && start + bytes <= range->start + range->bytes;
}

static bool is_allocated(const struct context *context, uintptr_t start, size_t bytes)
{
    for (struct range *range = allocations; range; range = range->next)
        if (range->context == context && holds(range, start, bytes))
            return true;
    return false;
}

static void add_range(struct range **list, uintptr_t start, size_t bytes, struct context *context)
{
    struct range *range = malloc(sizeof *range);
    *range = (struct range){start, bytes, context, *list};
    *list = range;
}

/* The bytes of the range that begins at `start`, which is removed; 0 if there is none. */
static size_t remove_range(struct range **list, uintptr_t start)
{
    for (; *list; list = &(*list)->next) {
        struct range *range = *list;
        if (range->start != start)
            continue;
        size_t bytes = range->bytes;
        *list = range->next;
        free(range);
        return bytes;
    }
    return 0;
}

static void free_device_memory(uintptr_t address)
{
    bytes_allocated -= remove_range(&allocations, address);
    free((void *)address);
}

/* -- Events ------------------------------------------------------------------------------------ */

static void release_event(struct event *event)
{
    if (--event->references > 0)
        return;
    struct event **link = &events;
    while (*link != event)
        link = &(*link)->next;
    *link = event->next;
    free(event);
}

static bool is_event(const struct event *handle)
{
    for (struct event *event = events; event; event = event->next)
        if (event == handle)
            return event->is_alive;
    return false;
}

/* -- Streams: a thread each -------------------------------------------------------------------- */

static bool is_copy(const struct operation *operation)
{
    return operation->kind <= COPY_WITHIN;
}

static bool may_start(const struct stream *stream, const struct operation *operation)
{
    if (stream->context->lost)
        return true;
    if (stream->is_held || (are_copies_held && is_copy(operation)))
        return false;
    return operation->kind != WAIT || operation->event->passed >= operation->turn;
}

/* Nothing happens in this stream until something else does. */
static bool is_quiet(const struct stream *stream)
{
    return !stream->is_running && (!stream->first || !may_start(stream, stream->first));
}

static bool is_done(const struct stream *stream)
{
    return !stream->is_running && !stream->first;
}

static bool has_its_device_memory(const struct context *context, const struct operation *operation)
{
    bool reads = operation->kind == COPY_DOWN || operation->kind == COPY_WITHIN;
    bool writes = operation->kind != COPY_DOWN;
    return (!reads || is_allocated(context, operation->from, operation->bytes)) &&
           (!writes || is_allocated(context, operation->to, operation->bytes));
}

static bool is_busy(const struct context *context, const struct stream *except)
{
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream->context == context && stream != except && stream->is_running)
            return true;
    return false;
}

/* When the loss can be seen, the device has stopped: it writes to nobody's memory any more. */
static void lose(struct context *context, unsigned code, const struct stream *reporter)
{
    while (is_busy(context, reporter))
        pthread_cond_wait(&changed, &world);
    context->lost = code;
    pthread_cond_broadcast(&changed);
}

static void move_bytes(struct stream *stream, struct operation *operation)
{
    struct context *context = stream->context;
    if (!has_its_device_memory(context, operation)) {
        lose(context, ILLEGAL_ADDRESS, stream);
        return;
    }
    long delay_ns = is_copy(operation) ? copies_delayed_by_us * 1000L : 0;
    pthread_mutex_unlock(&world);
    if (delay_ns > 0)
        nanosleep(&(struct timespec){.tv_nsec = delay_ns}, NULL);
    memcpy((void *)operation->to, (void *)operation->from, operation->bytes);
    pthread_mutex_lock(&world);
    if (is_copy(operation)) {
        copies_run++;
        bytes_copied += operation->bytes;
    }
}

static void execute(struct stream *stream, struct operation *operation)
{
    if (operation->kind == FREE)
        free_device_memory(operation->from);
    else if (operation->kind == PASS)
        operation->event->passed = operation->turn;
    else if (operation->kind != WAIT)
        move_bytes(stream, operation);
}

static void discard(struct operation *operation)
{
    if (operation->event)
        release_event(operation->event);
    if (operation->kind == WRITE)
        free((void *)operation->from);
    free(operation);
}

static void run_next(struct stream *stream)
{
    struct operation *operation = stream->first;
    stream->first = operation->next;
    if (!stream->first)
        stream->last = &stream->first;
    stream->is_running = true;
    if (!stream->context->lost || operation->kind == FREE)
        execute(stream, operation);
    discard(operation);
    stream->is_running = false;
    pthread_cond_broadcast(&changed);
}

static void forget_stream(struct stream *stream)
{
    struct stream **link = &streams;
    while (*link != stream)
        link = &(*link)->next;
    *link = stream->next;
    free(stream);
    pthread_cond_broadcast(&changed);
}

static void *run_stream(void *argument)
{
    struct stream *stream = argument;
    pthread_mutex_lock(&world);
    while (stream->first || !stream->is_ending) {
        if (stream->first && may_start(stream, stream->first))
            run_next(stream);
        else
            pthread_cond_wait(&changed, &world);
    }
    forget_stream(stream);
    pthread_mutex_unlock(&world);
    return NULL;
}

static struct stream *make_stream(struct context *context, bool is_ours)
{
    struct stream *stream = calloc(1, sizeof *stream);
    stream->context = context;
    stream->last = &stream->first;
    stream->is_ours = is_ours;
    stream->next = streams;
    streams = stream;
    pthread_t thread;
    pthread_create(&thread, NULL, run_stream, stream);
    pthread_detach(thread);
    return stream;
}

static void end_stream(struct stream *stream)
{
    stream->is_ending = true;
    pthread_cond_broadcast(&changed);
}

static void append(struct stream *stream, struct operation fields)
{
    struct operation *operation = malloc(sizeof *operation);
    *operation = fields;
    *stream->last = operation;
    stream->last = &operation->next;
    if (operation->event)
        operation->event->references++;
    pthread_cond_broadcast(&changed);
}

/* The live stream behind a handle in `context`, or NULL. */
static struct stream *find_stream(struct context *context, struct stream *handle)
{
    if (!handle) {
        if (!context->legacy)
            context->legacy = make_stream(context, false);
        return context->legacy;
    }
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream == handle && !stream->is_ending)
            return stream;
    return NULL;
}

static bool is_capturing(void)
{
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream->is_captured)
            return true;
    return false;
}

/* -- How every call begins and ends ------------------------------------------------------------ */

static struct call *find_call(const char *name)
{
    struct call *call = calls;
    while (call->name && strcmp(call->name, name) != 0)
        call++;
    call->name = name;
    return call;
}

static struct context *current(void)
{
    return pushed_count ? pushed[pushed_count - 1] : NULL;
}

/* Locks the world, counts the call, and holds or fails it if a test has asked for that. */
static unsigned begin(const char *name)
{
    pthread_mutex_lock(&world);
    struct call *call = find_call(name);
    call->calls++;
    while (held_call && strcmp(held_call, name) == 0)
        pthread_cond_wait(&changed, &world);
    if (call->fails_for && --call->fails_in == 0) {
        call->fails_for--;
        call->fails_in = 1;
        failures++;
        return call->fails_with;
    }
    return is_initialized ? SUCCESS : NOT_INITIALIZED;
}

/* The same for a call that needs a context whose device is not lost. */
static unsigned begin_in_context(const char *name)
{
    unsigned code = begin(name);
    if (code)
        return code;
    return current() ? current()->lost : INVALID_CONTEXT;
}

/* The same for a call that may not be made while a graph is captured. */
static unsigned begin_unsafe(const char *name)
{
    unsigned code = begin_in_context(name);
    if (code)
        return code;
    return is_capturing() && capture_mode == CAPTURE_MODE_GLOBAL ? CAPTURE_UNSUPPORTED : SUCCESS;
}

static unsigned end(unsigned code)
{
    pthread_mutex_unlock(&world);
    return code;
}

/* -- The driver and its devices ---------------------------------------------------------------- */

unsigned cuDriverGetVersion(int *found)
{
    *found = version;
    return SUCCESS;
}

unsigned cuInit(unsigned flags)
{
    unsigned code = begin("cuInit");
    if (code == NOT_INITIALIZED)
        code = flags ? INVALID_VALUE : devices ? SUCCESS : NO_DEVICE;
    is_initialized = code == SUCCESS;
    for (int device = 0; device < DEVICES_MAX; device++)
        contexts[device].device = device;
    return end(code);
}

unsigned cuDeviceGetCount(int *count)
{
    unsigned code = begin("cuDeviceGetCount");
    if (!code)
        *count = devices;
    return end(code);
}

unsigned cuDeviceGet(int *device, int ordinal)
{
    unsigned code = begin("cuDeviceGet");
    if (!code && (ordinal < 0 || ordinal >= devices))
        code = INVALID_DEVICE;
    if (!code)
        *device = ordinal;
    return end(code);
}

unsigned cuGetErrorName(unsigned code, const char **name)
{
    static const struct { unsigned code; const char *name; } names[] = {
        {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
        {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
        {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
        {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
        {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
        {ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
    };
    for (size_t index = 0; index < sizeof names / sizeof *names; index++)
        if (names[index].code == code) {
            *name = names[index].name;
            return SUCCESS;
        }
    *name = NULL;
    return INVALID_VALUE;
}

unsigned cuGetErrorString(unsigned code, const char **text)
{
    unsigned found = cuGetErrorName(code, text);
    if (!found)
        *text = "said by the stand-in";
    return found;
}

/* -- Contexts ---------------------------------------------------------------------------------- */

unsigned cuDevicePrimaryCtxRetain(struct context **context, int device)
{
    unsigned code = begin("cuDevicePrimaryCtxRetain");
    if (!code && (device < 0 || device >= devices))
        code = INVALID_DEVICE;
    if (!code) {
        *context = &contexts[device];
        contexts[device].retained++;
        contexts_retained++;
    }
    return end(code);
}

unsigned cuDevicePrimaryCtxRelease_v2(int device)
{
    unsigned code = begin("cuDevicePrimaryCtxRelease_v2");
    if (device < 0 || device >= devices || !contexts[device].retained)
        return end(INVALID_CONTEXT);
    contexts[device].retained--;
    contexts_retained--;
    return end(code ? code : contexts[device].lost);
}

unsigned cuCtxPushCurrent_v2(struct context *context)
{
    unsigned code = begin("cuCtxPushCurrent_v2");
    if (!code && (!context || !context->retained || pushed_count == CONTEXTS_PUSHED_MAX))
        code = INVALID_CONTEXT;
    if (!code)
        pushed[pushed_count++] = context;
    return end(code);
}

unsigned cuCtxPopCurrent_v2(struct context **context)
{
    unsigned code = begin("cuCtxPopCurrent_v2");
    if (!current())
        return end(INVALID_CONTEXT);
    *context = pushed[--pushed_count];
    return end(code);
}

unsigned cuThreadExchangeStreamCaptureMode(unsigned *mode)
{
    unsigned code = begin("cuThreadExchangeStreamCaptureMode");
    if (!code) {
        unsigned previous = capture_mode;
        capture_mode = *mode;
        *mode = previous;
    }
    return end(code);
}

/* -- Streams and events ------------------------------------------------------------------------ */

unsigned cuStreamCreate(struct stream **stream, unsigned flags)
{
    unsigned code = begin_in_context("cuStreamCreate");
    if (!code && flags != STREAM_NON_BLOCKING)
        code = INVALID_VALUE;
    if (!code)
        *stream = make_stream(current(), true);
    return end(code);
}

unsigned cuStreamDestroy_v2(struct stream *handle)
{
    unsigned code = begin("cuStreamDestroy_v2");
    struct stream *stream = handle ? find_stream(NULL, handle) : NULL;
    if (!stream)
        return end(INVALID_HANDLE);
    code = code ? code : stream->context->lost;
    end_stream(stream);
    return end(code);
}

unsigned cuStreamSynchronize(struct stream *handle)
{
    unsigned code = begin_unsafe("cuStreamSynchronize");
    if (code)
        return end(code);
    struct context *context = current();
    struct stream *stream = find_stream(context, handle);
    if (!stream || stream->context != context)
        return end(INVALID_HANDLE);
    while (!is_done(stream))
        pthread_cond_wait(&changed, &world);
    return end(context->lost);
}

unsigned cuStreamWaitEvent(struct stream *handle, struct event *event, unsigned flags)
{
    unsigned code = begin_in_context("cuStreamWaitEvent");
    if (code)
        return end(code);
    struct stream *stream = find_stream(current(), handle);
    if (!stream || !is_event(event))
        return end(INVALID_HANDLE);
    if (flags)
        return end(INVALID_VALUE);
    append(stream, (struct operation){.kind = WAIT, .event = event, .turn = event->recorded});
    return end(SUCCESS);
}

unsigned cuStreamIsCapturing(struct stream *handle, unsigned *status)
{
    unsigned code = begin_in_context("cuStreamIsCapturing");
    if (code)
        return end(code);
    struct stream *stream = find_stream(current(), handle);
    if (!stream)
        return end(INVALID_HANDLE);
    if (!handle && is_capturing())
        return end(CAPTURE_IMPLICIT);
    *status = stream->is_captured;
    return end(SUCCESS);
}

unsigned cuEventCreate(struct event **handle, unsigned flags)
{
    unsigned code = begin_in_context("cuEventCreate");
    (void)flags;
    if (code)
        return end(code);
    struct event *event = calloc(1, sizeof *event);
    *event = (struct event){
        .context = current(), .references = 1, .is_alive = true, .next = events};
    events = event;
    *handle = event;
    return end(SUCCESS);
}

unsigned cuEventDestroy_v2(struct event *event)
{
    unsigned code = begin("cuEventDestroy_v2");
    if (!is_event(event))
        return end(INVALID_HANDLE);
    code = code ? code : event->context->lost;
    event->is_alive = false;
    release_event(event);
    return end(code);
}

unsigned cuEventRecord(struct event *event, struct stream *handle)
{
    unsigned code = begin_in_context("cuEventRecord");
    if (code)
        return end(code);
    struct stream *stream = find_stream(current(), handle);
    if (!stream || !is_event(event) || event->context != stream->context)
        return end(INVALID_HANDLE);
    event->recorded++;
    append(stream, (struct operation){.kind = PASS, .event = event, .turn = event->recorded});
    return end(SUCCESS);
}

unsigned cuEventSynchronize(struct event *event)
{
    unsigned code = begin_unsafe("cuEventSynchronize");
    if (code)
        return end(code);
    if (!is_event(event))
        return end(INVALID_HANDLE);
    uint64_t turn = event->recorded;
    while (event->passed < turn && !event->context->lost)
        pthread_cond_wait(&changed, &world);
    return end(event->context->lost);
}

/* -- Memory and copies ------------------------------------------------------------------------- */

static uintptr_t allocate(struct context *context, size_t bytes)
{
    if (bytes > DEVICE_BYTES - bytes_allocated)
        return 0;
    uintptr_t address = (uintptr_t)malloc(bytes);
    add_range(&allocations, address, bytes, context);
    bytes_allocated += bytes;
    return address;
}

unsigned cuMemAllocAsync(uint64_t *address, size_t bytes, struct stream *handle)
{
    unsigned code = begin_in_context("cuMemAllocAsync");
    if (code)
        return end(code);
    if (!find_stream(current(), handle))
        return end(INVALID_HANDLE);
    if (!bytes)
        return end(INVALID_VALUE);
    *address = allocate(current(), bytes);
    return end(*address ? SUCCESS : OUT_OF_MEMORY);
}

unsigned cuMemFreeAsync(uint64_t address, struct stream *handle)
{
    unsigned code = begin("cuMemFreeAsync");
    struct stream *stream = handle ? find_stream(NULL, handle) : NULL;
    if (!stream)
        return end(INVALID_HANDLE);
    if (!is_allocated(stream->context, (uintptr_t)address, 1))
        return end(INVALID_VALUE);
    append(stream, (struct operation){.kind = FREE, .from = (uintptr_t)address});
    return end(code ? code : stream->context->lost);
}

unsigned cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes)
{
    unsigned code = begin_in_context("cuMemGetInfo_v2");
    if (!code) {
        *free_bytes = DEVICE_BYTES - bytes_allocated;
        *total_bytes = DEVICE_BYTES;
    }
    return end(code);
}

/* Pages that the driver has to fetch, because nobody has touched them. */
static uint64_t missing_pages(uintptr_t start, size_t bytes)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = start / page * page;
    size_t count = (start + bytes - first + page - 1) / page;
    unsigned char *is_there = calloc(count, 1);
    uint64_t missing = 0;
    if (mincore((void *)first, count * page, is_there) == 0)
        for (size_t index = 0; index < count; index++)
            missing += !(is_there[index] & 1);
    free(is_there);
    return missing;
}

unsigned cuMemHostRegister_v2(void *start, size_t bytes, unsigned flags)
{
    unsigned code = begin_unsafe("cuMemHostRegister_v2");
    (void)flags;
    if (code)
        return end(code);
    if (!start || !bytes)
        return end(INVALID_VALUE);
    for (struct range *range = registrations; range; range = range->next)
        if (touches(range, (uintptr_t)start, bytes))
            return end(ALREADY_REGISTERED);
    pages_fetched += missing_pages((uintptr_t)start, bytes);
    add_range(&registrations, (uintptr_t)start, bytes, current());
    bytes_registered += bytes;
    return end(SUCCESS);
}

unsigned cuMemHostUnregister(void *start)
{
    unsigned code = begin("cuMemHostUnregister");
    if (!current())
        return end(INVALID_CONTEXT);
    size_t bytes = remove_range(&registrations, (uintptr_t)start);
    if (!bytes)
        return end(NOT_REGISTERED);
    bytes_registered -= bytes;
    return end(code ? code : current()->lost);
}

/* Memory of the host in no registration is pageable; in parts of several it is refused. */
static unsigned check_host_memory(uintptr_t start, size_t bytes)
{
    for (struct range *range = registrations; range; range = range->next) {
        if (holds(range, start, bytes))
            return SUCCESS;
        if (touches(range, start, bytes))
            return INVALID_VALUE;
    }
    pageable_copies++;
    return SUCCESS;
}

static unsigned copy(unsigned code, struct stream *handle, struct operation operation)
{
    if (code)
        return end(code);
    struct stream *stream = find_stream(current(), handle);
    if (!stream || stream->context != current())
        return end(INVALID_HANDLE);
    if (operation.kind != COPY_WITHIN) {
        uintptr_t host = operation.kind == COPY_DOWN ? operation.to : operation.from;
        code = check_host_memory(host, operation.bytes);
    }
    if (!code)
        append(stream, operation);
    return end(code);
}

unsigned cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, struct stream *stream)
{
    struct operation operation = {COPY_DOWN, (uintptr_t)to, (uintptr_t)from, bytes};
    return copy(begin_in_context("cuMemcpyDtoHAsync_v2"), stream, operation);
}

unsigned cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, struct stream *stream)
{
    struct operation operation = {COPY_UP, (uintptr_t)to, (uintptr_t)from, bytes};
    return copy(begin_in_context("cuMemcpyHtoDAsync_v2"), stream, operation);
}

unsigned cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, struct stream *stream)
{
    struct operation operation = {COPY_WITHIN, (uintptr_t)to, (uintptr_t)from, bytes};
    return copy(begin_in_context("cuMemcpyDtoDAsync_v2"), stream, operation);
}

/* -- The tests' controls ----------------------------------------------------------------------- */

/* Before `cuInit`. */
void stand_in_set_up(int reported_version, int device_count)
{
    version = reported_version;
    devices = device_count;
}

/* Memory of a device, which a caller such as torch has allocated. */
uint64_t stand_in_allocate(int device, size_t bytes)
{
    pthread_mutex_lock(&world);
    uint64_t address = allocate(&contexts[device], bytes);
    pthread_mutex_unlock(&world);
    return address;
}

void stand_in_free(uint64_t address)
{
    pthread_mutex_lock(&world);
    free_device_memory((uintptr_t)address);
    pthread_mutex_unlock(&world);
}

/* A caller's stream; 0 asks for the legacy default stream of the device. */
struct stream *stand_in_make_stream(int device)
{
    pthread_mutex_lock(&world);
    struct stream *stream = make_stream(&contexts[device], false);
    pthread_mutex_unlock(&world);
    return stream;
}

struct stream *stand_in_legacy_stream(int device)
{
    pthread_mutex_lock(&world);
    struct stream *stream = find_stream(&contexts[device], NULL);
    pthread_mutex_unlock(&world);
    return stream;
}

void stand_in_end_stream(struct stream *stream)
{
    pthread_mutex_lock(&world);
    end_stream(stream);
    pthread_mutex_unlock(&world);
}

/* Writes to a device's memory when the stream's turn comes, as a kernel of an optimizer would. */
void stand_in_write(struct stream *stream, uint64_t to, const void *from, size_t bytes)
{
    void *kept = malloc(bytes);
    memcpy(kept, from, bytes);
    pthread_mutex_lock(&world);
    append(stream, (struct operation){WRITE, (uintptr_t)to, (uintptr_t)kept, bytes});
    pthread_mutex_unlock(&world);
}

/* A stream that is held begins nothing. */
void stand_in_hold(struct stream *stream, bool is_held)
{
    pthread_mutex_lock(&world);
    stream->is_held = is_held;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&world);
}

/* While copies are held, a stream stops in front of one. */
void stand_in_hold_copies(bool are_held)
{
    pthread_mutex_lock(&world);
    are_copies_held = are_held;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&world);
}

/* Calls of that name wait until another one, or none (NULL), is held; `name` stays valid. */
void stand_in_hold_call(const char *name)
{
    pthread_mutex_lock(&world);
    held_call = name;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&world);
}

void stand_in_capture(struct stream *stream, bool is_captured)
{
    pthread_mutex_lock(&world);
    stream->is_captured = is_captured;
    pthread_mutex_unlock(&world);
}

static bool are_all_quiet(void)
{
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (!is_quiet(stream))
            return false;
    return true;
}

/* Waits until nothing can happen any more without a call or a control: in place of a sleep. */
void stand_in_settle(void)
{
    pthread_mutex_lock(&world);
    while (!are_all_quiet())
        pthread_cond_wait(&changed, &world);
    pthread_mutex_unlock(&world);
}

void stand_in_delay_copies(int microseconds)
{
    pthread_mutex_lock(&world);
    copies_delayed_by_us = microseconds;
    pthread_mutex_unlock(&world);
}

/* Lets the n-th call of that name from now fail, `times` in a row; `name` stays valid. */
void stand_in_fail(const char *name, uint64_t nth, uint64_t times, unsigned code)
{
    pthread_mutex_lock(&world);
    struct call *call = find_call(name);
    call->fails_in = nth;
    call->fails_for = times;
    call->fails_with = code;
    pthread_mutex_unlock(&world);
}

/* Loses a device. */
void stand_in_lose(int device, unsigned code)
{
    pthread_mutex_lock(&world);
    lose(&contexts[device], code, NULL);
    pthread_mutex_unlock(&world);
}

struct counters {
    uint64_t copies_run, bytes_copied, pageable_copies, failures;
    uint64_t live_streams, live_events, contexts_retained, bytes_allocated, bytes_registered;
};

void stand_in_count(struct counters *counters)
{
    pthread_mutex_lock(&world);
    *counters = (struct counters){
        .copies_run = copies_run,
        .bytes_copied = bytes_copied,
        .pageable_copies = pageable_copies,
        .failures = failures,
        .contexts_retained = (uint64_t)contexts_retained,
        .bytes_allocated = bytes_allocated,
        .bytes_registered = bytes_registered,
    };
    for (struct stream *stream = streams; stream; stream = stream->next)
        counters->live_streams += stream->is_ours && !stream->is_ending;
    for (struct event *event = events; event; event = event->next)
        counters->live_events += event->is_alive;
    pthread_mutex_unlock(&world);
}

uint64_t stand_in_calls(const char *name)
{
    pthread_mutex_lock(&world);
    uint64_t count = find_call(name)->calls;
    pthread_mutex_unlock(&world);
    return count;
}

/* Pages that the driver had to fetch itself to pin them. */
uint64_t stand_in_pages_fetched(void)
{
    pthread_mutex_lock(&world);
    uint64_t count = pages_fetched;
    pthread_mutex_unlock(&world);
    return count;
}

/* How often any function of the driver was called. */
uint64_t stand_in_all_calls(void)
{
    uint64_t count = 0;
    pthread_mutex_lock(&world);
    for (struct call *call = calls; call->name; call++)
        count += call->calls;
    pthread_mutex_unlock(&world);
    return count;
}

/* How many contexts are current on this thread, below each other. */
int stand_in_pushed(void)
{
    return pushed_count;
}

/* The mode of this thread towards captures. */
unsigned stand_in_capture_mode(void)
{
    return capture_mode;
}

/* Puts every control back, forgets what a failure kept from being freed, and sets every count of
 * what has happened to 0. */
void stand_in_reset(void)
{
    pthread_mutex_lock(&world);
    while (registrations)
        bytes_registered -= remove_range(&registrations, registrations->start);
    while (allocations)
        free_device_memory(allocations->start);
    are_copies_held = false;
    held_call = NULL;
    copies_delayed_by_us = 0;
    copies_run = bytes_copied = pageable_copies = failures = 0;
    for (struct call *call = calls; call->name; call++)
        *call = (struct call){.name = call->name};
    for (int device = 0; device < DEVICES_MAX; device++)
        contexts[device].lost = 0;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&world);
}
