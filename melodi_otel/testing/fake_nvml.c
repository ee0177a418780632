/*
 * A fake libnvidia-ml.so.1: the part of NVML that an energy meter asks for, driven by a file that a test or a demo maps
 * beside it (see nvml.py, which mirrors every struct here).
 *
 * The state lies in the file named by MELODI_FAKE_NVML_STATE, else in "fake_nvml.state" beside this library. It is
 * mapped, not parsed, so a change shows at the next call and a call costs about what a real one costs in Python. All
 * energy arithmetic is in integers (mW x ns), so a test may ask for exact joules.
 *
 * FAKE_WITHOUT_<function> at compile time leaves a function out: a library that is too old.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MAX_GPUS = 16, MAX_SLICES = 8, MAX_PIDS = 16, MAX_LOADS = 64, MAX_SEGMENTS = 8192, MAX_RULES = 32, MAX_CALLS = 64, NAME = 64 };
enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, VERSION_MISMATCH = 25
};
enum { ANSWER_ZERO = -1 }; /* a rule's code: succeed, with the value 0 */
enum { NO_MODULE = 0, MODULE_TOO = 1, MODULE_ONLY = 2 };
enum { FIELD_ENERGY = 83, FIELD_AVERAGE = 185, FIELD_INSTANT = 186 };
enum { SCOPE_GPU = 0, SCOPE_MODULE = 1 };
static const uint64_t MAGIC = 0x6d656c6f64693031ull;

typedef struct { int64_t t_ns; int64_t mw; } segment_t;

typedef struct {
    char uuid[96];
    char name[96];
    uint32_t gpu_instance, compute_instance, gpu_slices, compute_slices;
    uint64_t memory_mb;
} slice_t;

/* How much a process used of a board in the sample period that ended at t_us (microseconds since the epoch). */
typedef struct { int64_t t_us; uint32_t pid, sm, memory, unused; } load_t;

typedef struct {
    char uuid[96];
    char name[96];
    uint32_t architecture, major, minor, domain, bus, slot, cores, sm_clock_mhz;
    int64_t period_ns, offset_ns, delay_ns;                          /* of the energy counter */
    int64_t gauge_period_ns, instant_window_ns, average_window_ns, draw_window_ns;
    uint64_t base_mj;                                                /* the counter when its time began */
    int64_t reset_ns;                                                /* its time began here */
    int64_t module_extra_mw;                                         /* what the rest of the module draws */
    uint32_t has_energy, has_fields, has_instant, has_average, has_draw, module;
    uint32_t has_utilization, utilization_percent;
    uint64_t memory_total, memory_used, memory_reserved;
    int64_t fast_poll_ns;                                            /* closer readings get fast_poll_code */
    int32_t fast_poll_code;
    uint32_t lost;
    uint32_t mig_mode, max_slices, slice_count, pid_count, segment_count;
    uint32_t minor_plus_one;                                         /* of /dev/nvidiaN; 0: not told */
    uint32_t graphics_count, load_count, has_loads;
    uint32_t mig_private;                                            /* only root may list a partitioned board */
    int64_t last_read_ns;                                            /* written by the library */
    uint32_t pids[MAX_PIDS];
    uint32_t pid_slices[MAX_PIDS];                                   /* the slice it is on, plus one; 0: the board */
    uint32_t graphics[MAX_PIDS];
    load_t loads[MAX_LOADS];
    slice_t slices[MAX_SLICES];
    segment_t segments[MAX_SEGMENTS];
} gpu_t;

typedef struct {
    char function[NAME];
    int32_t gpu;                                                     /* -1: any */
    int32_t code;
    int64_t after;                                                   /* matching calls that still work */
    int64_t times;                                                   /* calls that then fail; -1: all */
    int64_t seen;                                                    /* written by the library */
    int64_t delay_us;
} rule_t;

typedef struct { char function[NAME]; uint64_t count; } calls_t;

typedef struct {
    uint64_t magic, size;
    char driver[80];
    int32_t monotonic;                                               /* 1: CLOCK_MONOTONIC, 0: now_ns by hand */
    uint32_t gpu_count, rule_count, init_error;
    int64_t origin_ns, now_ns;
    int64_t epoch_us;                                                /* microseconds since the epoch at time 0 */
    int64_t initialized;                                             /* written by the library: its reference count */
    rule_t rules[MAX_RULES];
    calls_t calls[MAX_CALLS];
    gpu_t gpus[MAX_GPUS];
} state_t;

typedef struct { char is_slice; uint32_t gpu, slice; } handle_t;

static state_t *state = NULL;
static int references = 0;
static handle_t boards[MAX_GPUS];
static handle_t slices[MAX_GPUS][MAX_SLICES];

/* ---- the state file ------------------------------------------------------------------------------------------- */

static int map_state(void) {
    char path[4096];
    const char *named = getenv("MELODI_FAKE_NVML_STATE");
    if (named && *named) {
        snprintf(path, sizeof path, "%s", named);
    } else {
        Dl_info info;
        char self[3072];
        if (!dladdr((void *)map_state, &info) || !info.dli_fname) return DRIVER_NOT_LOADED;
        snprintf(self, sizeof self, "%s", info.dli_fname);
        snprintf(path, sizeof path, "%s/fake_nvml.state", dirname(self));
    }
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return DRIVER_NOT_LOADED;
    struct stat st;
    if (fstat(fd, &st) != 0 || (size_t)st.st_size < sizeof(state_t)) { close(fd); return VERSION_MISMATCH; }
    void *memory = mmap(NULL, sizeof(state_t), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (memory == MAP_FAILED) return DRIVER_NOT_LOADED;
    state = memory;
    if (state->magic != MAGIC || state->size != sizeof(state_t)) {
        munmap(memory, sizeof(state_t));
        state = NULL;
        return VERSION_MISMATCH;
    }
    return OK;
}

/* ---- time, energy, watts -------------------------------------------------------------------------------------- */

static int64_t now_ns(void) {
    if (!state->monotonic) return state->now_ns;
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec - state->origin_ns;
}

/* Energy in mW*ns (1e-12 J) that the board used from the script's start until t. */
static __int128 used(const gpu_t *gpu, int64_t t, int64_t extra_mw) {
    __int128 sum = 0;
    for (uint32_t i = 0; i < gpu->segment_count; i++) {
        int64_t from = gpu->segments[i].t_ns;
        int64_t to = i + 1 < gpu->segment_count ? gpu->segments[i + 1].t_ns : t;
        if (to > t) to = t;
        if (to > from) sum += (__int128)(gpu->segments[i].mw + extra_mw) * (to - from);
    }
    return sum;
}

static int64_t tick(int64_t t, int64_t period, int64_t offset) {
    if (period <= 0) return t;
    int64_t since = t - offset;
    int64_t rest = since % period;
    if (rest < 0) rest += period;
    return t - rest;
}

static uint64_t energy_mj(const gpu_t *gpu) {
    int64_t shown = tick(now_ns(), gpu->period_ns, gpu->offset_ns) - gpu->delay_ns;
    int64_t extra = gpu->module == NO_MODULE ? 0 : gpu->module_extra_mw;
    __int128 sum = shown > gpu->reset_ns ? used(gpu, shown, extra) - used(gpu, gpu->reset_ns, extra) : 0;
    return gpu->base_mj + (uint64_t)(sum / 1000000000);
}

static uint32_t power_mw(const gpu_t *gpu, int64_t window, int64_t extra) {
    int64_t t = tick(now_ns(), gpu->gauge_period_ns, gpu->offset_ns);
    if (window <= 0) window = 1;
    return (uint32_t)((used(gpu, t, extra) - used(gpu, t - window, extra)) / window);
}

/* ---- one door for every call ---------------------------------------------------------------------------------- */

#define CALL(name, gpu_index)                                                             \
    static int counted = -1;                                                              \
    int code = enter(name, gpu_index, &counted);                                          \
    if (code > 0) return code;

static int count_slot(const char *name) {
    for (int i = 0; i < MAX_CALLS; i++) {
        if (state->calls[i].function[0] == 0) snprintf(state->calls[i].function, NAME, "%s", name);
        if (strcmp(state->calls[i].function, name) == 0) return i;
    }
    return MAX_CALLS - 1;
}

static int enter(const char *name, int gpu, int *counted) {
    if (!state) return UNINITIALIZED;
    if (*counted < 0 || strcmp(state->calls[*counted].function, name) != 0) *counted = count_slot(name);
    __atomic_add_fetch(&state->calls[*counted].count, 1, __ATOMIC_RELAXED);
    for (uint32_t i = 0; i < state->rule_count && i < MAX_RULES; i++) {
        rule_t *rule = &state->rules[i];
        if ((rule->gpu >= 0 && rule->gpu != gpu) || strcmp(rule->function, name) != 0) continue;
        int64_t seen = __atomic_fetch_add(&rule->seen, 1, __ATOMIC_RELAXED);
        if (seen < rule->after || (rule->times >= 0 && seen >= rule->after + rule->times)) continue;
        if (rule->delay_us > 0) {
            struct timespec pause = { rule->delay_us / 1000000, (rule->delay_us % 1000000) * 1000 };
            nanosleep(&pause, NULL);
        }
        if (rule->code != OK) return rule->code;
    }
    if (gpu >= 0 && state->gpus[gpu].lost) return GPU_IS_LOST;
    return OK;
}

static gpu_t *board(void *handle, int *index) {
    handle_t *h = handle;
    *index = -1;
    if (!state || !h || h < boards || h >= boards + MAX_GPUS || h->gpu >= state->gpu_count) return NULL;
    *index = (int)h->gpu;
    return &state->gpus[h->gpu];
}

static slice_t *slice(void *handle, int *index) {
    handle_t *h = handle;
    *index = -1;
    if (!state || !h || h < &slices[0][0] || h >= &slices[0][0] + MAX_GPUS * MAX_SLICES) return NULL;
    if (h->gpu >= state->gpu_count || h->slice >= state->gpus[h->gpu].slice_count) return NULL;
    *index = (int)h->gpu;
    return &state->gpus[h->gpu].slices[h->slice];
}

#define BOARD(name)                                                                       \
    int index;                                                                            \
    gpu_t *gpu = board(handle, &index);                                                   \
    CALL(name, index)                                                                     \
    if (!gpu) return INVALID_ARGUMENT;

/* Readings that come too close to each other, as some drivers answer them: 1 where the value is spoilt. */
static int too_fast(gpu_t *gpu) {
    if (gpu->fast_poll_ns <= 0) return 0;
    int64_t t = now_ns();
    int fast = gpu->last_read_ns != INT64_MIN && t - gpu->last_read_ns < gpu->fast_poll_ns;
    gpu->last_read_ns = t;
    return fast;
}

static int put(char *out, unsigned length, const char *text) {
    if (!out) return INVALID_ARGUMENT;
    if (strlen(text) + 1 > length) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return OK;
}

/* ---- library -------------------------------------------------------------------------------------------------- */

#ifndef FAKE_WITHOUT_nvmlInitWithFlags
int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (!state) {
        int mapped = map_state();
        if (mapped != OK) return mapped;
        for (uint32_t g = 0; g < MAX_GPUS; g++) {
            boards[g] = (handle_t){ 0, g, 0 };
            for (uint32_t s = 0; s < MAX_SLICES; s++) slices[g][s] = (handle_t){ 1, g, s };
        }
    }
    static int counted = -1;
    int code = enter("nvmlInitWithFlags", -1, &counted);
    if (code == OK) code = (int)state->init_error;
    if (code == OK) state->initialized = ++references;
    if (code != OK && references == 0) { munmap(state, sizeof(state_t)); state = NULL; }
    return code;
}
#endif

#ifndef FAKE_WITHOUT_nvmlShutdown
int nvmlShutdown(void) {
    CALL("nvmlShutdown", -1)
    if (references > 0) state->initialized = --references;
    if (references == 0) { munmap(state, sizeof(state_t)); state = NULL; }
    return OK;
}
#endif

const char *nvmlErrorString(int code) {
    switch (code) {
        case OK: return "Success";
        case NOT_SUPPORTED: return "Not Supported";
        case GPU_IS_LOST: return "GPU is lost";
        default: return "Fake NVML error";
    }
}

#ifndef FAKE_WITHOUT_nvmlSystemGetDriverVersion
int nvmlSystemGetDriverVersion(char *out, unsigned length) {
    CALL("nvmlSystemGetDriverVersion", -1)
    return put(out, length, state->driver);
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetCount_v2
int nvmlDeviceGetCount_v2(unsigned *count) {
    CALL("nvmlDeviceGetCount_v2", -1)
    *count = state->gpu_count;
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetHandleByIndex_v2
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    CALL("nvmlDeviceGetHandleByIndex_v2", index < MAX_GPUS ? (int)index : -1)
    if (index >= state->gpu_count) return INVALID_ARGUMENT;
    *handle = &boards[index];
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetHandleByUUID
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    int found = -1, part = -1;
    for (uint32_t g = 0; state && g < state->gpu_count; g++) {
        if (strcmp(state->gpus[g].uuid, uuid) == 0) found = (int)g;
        for (uint32_t s = 0; s < state->gpus[g].slice_count; s++)
            if (strcmp(state->gpus[g].slices[s].uuid, uuid) == 0) { found = (int)g; part = (int)s; }
    }
    CALL("nvmlDeviceGetHandleByUUID", found)
    if (found < 0) return NOT_FOUND;
    *handle = part < 0 ? &boards[found] : &slices[found][part];
    return OK;
}
#endif

/* ---- a board's facts ------------------------------------------------------------------------------------------ */

#ifndef FAKE_WITHOUT_nvmlDeviceGetUUID
int nvmlDeviceGetUUID(void *handle, char *out, unsigned length) {
    int index;
    slice_t *part = slice(handle, &index);
    gpu_t *gpu = part ? NULL : board(handle, &index);
    CALL("nvmlDeviceGetUUID", index)
    if (!part && !gpu) return INVALID_ARGUMENT;
    return put(out, length, part ? part->uuid : gpu->uuid);
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetName
int nvmlDeviceGetName(void *handle, char *out, unsigned length) {
    int index;
    slice_t *part = slice(handle, &index);
    gpu_t *gpu = part ? NULL : board(handle, &index);
    CALL("nvmlDeviceGetName", index)
    if (!part && !gpu) return INVALID_ARGUMENT;
    return put(out, length, part ? part->name : gpu->name);
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetIndex
int nvmlDeviceGetIndex(void *handle, unsigned *out) {
    BOARD("nvmlDeviceGetIndex")
    *out = (unsigned)index;
    return OK;
}
#endif

typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} pci_t;

#ifndef FAKE_WITHOUT_nvmlDeviceGetPciInfo_v3
int nvmlDeviceGetPciInfo_v3(void *handle, pci_t *out) {
    BOARD("nvmlDeviceGetPciInfo_v3")
    memset(out, 0, sizeof *out);
    out->domain = gpu->domain;
    out->bus = gpu->bus;
    out->device = gpu->slot;
    snprintf(out->bus_id, sizeof out->bus_id, "%08X:%02X:%02X.0", gpu->domain, gpu->bus & 0xff, gpu->slot & 0xff);
    snprintf(out->bus_id_legacy, sizeof out->bus_id_legacy, "%04X:%02X:%02X.0", gpu->domain & 0xffff, gpu->bus & 0xff,
             gpu->slot & 0xff);
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetMinorNumber
int nvmlDeviceGetMinorNumber(void *handle, unsigned *out) {
    BOARD("nvmlDeviceGetMinorNumber")
    if (!gpu->minor_plus_one) return NOT_SUPPORTED;
    *out = gpu->minor_plus_one - 1;
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetArchitecture
int nvmlDeviceGetArchitecture(void *handle, unsigned *out) {
    BOARD("nvmlDeviceGetArchitecture")
    *out = gpu->architecture;
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetCudaComputeCapability
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    BOARD("nvmlDeviceGetCudaComputeCapability")
    *major = (int)gpu->major;
    *minor = (int)gpu->minor;
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetNumGpuCores
int nvmlDeviceGetNumGpuCores(void *handle, unsigned *out) {
    BOARD("nvmlDeviceGetNumGpuCores")
    if (!gpu->cores) return NOT_SUPPORTED;
    *out = gpu->cores;
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetMaxClockInfo
int nvmlDeviceGetMaxClockInfo(void *handle, int kind, unsigned *out) {
    BOARD("nvmlDeviceGetMaxClockInfo")
    if (!gpu->sm_clock_mhz || kind == 2) return NOT_SUPPORTED;
    *out = gpu->sm_clock_mhz;
    return OK;
}
#endif

/* What other programs than an energy meter ask for before they read any energy. */
#ifndef FAKE_WITHOUT_nvmlDeviceGetTemperature
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *out) {
    BOARD("nvmlDeviceGetTemperature")
    if (sensor) return INVALID_ARGUMENT;
    *out = 50;
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetEnforcedPowerLimit
int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *out) {
    BOARD("nvmlDeviceGetEnforcedPowerLimit")
    *out = 700000;
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetComputeMode
int nvmlDeviceGetComputeMode(void *handle, int *out) {
    BOARD("nvmlDeviceGetComputeMode")
    *out = 0;
    return OK;
}
#endif

/* ---- energy and power ----------------------------------------------------------------------------------------- */

#ifndef FAKE_WITHOUT_nvmlDeviceGetTotalEnergyConsumption
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *out) {
    BOARD("nvmlDeviceGetTotalEnergyConsumption")
    if (!gpu->has_energy) return NOT_SUPPORTED;
    int fast = too_fast(gpu);
    if (fast && gpu->fast_poll_code > 0) return gpu->fast_poll_code;
    *out = fast || code == ANSWER_ZERO ? 0 : energy_mj(gpu);
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetPowerUsage
int nvmlDeviceGetPowerUsage(void *handle, unsigned *out) {
    BOARD("nvmlDeviceGetPowerUsage")
    if (!gpu->has_draw || gpu->module == MODULE_ONLY) return NOT_SUPPORTED;
    int fast = too_fast(gpu);
    if (fast && gpu->fast_poll_code > 0) return gpu->fast_poll_code;
    *out = fast || code == ANSWER_ZERO ? 0 : power_mw(gpu, gpu->draw_window_ns, 0);
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetSamples
typedef struct { unsigned long long t_us; union { unsigned ui; unsigned long long ull; } value; } power_sample_t;

/* Power of the last 2.4 s, a mean of 20 ms each, stamped with the time of day at its end. */
int nvmlDeviceGetSamples(void *handle, int kind, unsigned long long since_us, int *type, unsigned *count, power_sample_t *out) {
    BOARD("nvmlDeviceGetSamples")
    if (kind != 0 || gpu->module == MODULE_ONLY) return NOT_SUPPORTED;
    const int64_t grid = 20000000;
    int64_t last = now_ns() / grid;
    unsigned room = *count, found = 0;
    *type = 1;
    for (int64_t k = last - 118; k <= last; k++) {
        unsigned long long t_us = (unsigned long long)(state->epoch_us + k * grid / 1000);
        if (k < 1 || t_us <= since_us) continue;
        if (out && found < room) {
            out[found].t_us = t_us;
            out[found].value.ull = 0;
            out[found].value.ui = (unsigned)((used(gpu, k * grid, 0) - used(gpu, (k - 1) * grid, 0)) / grid);
        }
        found++;
    }
    *count = found;
    if (!found) return NOT_FOUND;
    return out && room < found ? INSUFFICIENT_SIZE : OK;
}
#endif

typedef union { double d; int si; unsigned ui; unsigned long ul; unsigned long long ull; long long sll; unsigned short us; } value_t;
typedef struct {
    unsigned field, scope;
    long long timestamp, latency_us;
    unsigned type, code;
    value_t value;
} field_t;

#ifndef FAKE_WITHOUT_nvmlDeviceGetFieldValues
int nvmlDeviceGetFieldValues(void *handle, int count, field_t *fields) {
    BOARD("nvmlDeviceGetFieldValues")
    if (!gpu->has_fields) return NOT_SUPPORTED;
    int fast = too_fast(gpu);
    for (int i = 0; i < count; i++) {
        field_t *f = &fields[i];
        unsigned scope = f->scope;
        int64_t extra = scope == SCOPE_MODULE ? gpu->module_extra_mw : 0;
        int scope_ok = scope == SCOPE_GPU ? gpu->module != MODULE_ONLY : scope == SCOPE_MODULE && gpu->module != NO_MODULE;
        f->timestamp = now_ns() / 1000;
        f->latency_us = 0;
        f->code = OK;
        f->value.ull = 0;
        if (fast && gpu->fast_poll_code > 0) { f->code = (unsigned)gpu->fast_poll_code; continue; }
        int zero = fast || code == ANSWER_ZERO;
        if (f->field == FIELD_ENERGY && gpu->has_energy) {
            f->type = 3;
            f->value.ull = zero ? 0 : energy_mj(gpu);
        } else if (f->field == FIELD_INSTANT && gpu->has_instant && scope_ok) {
            f->type = 1;
            f->value.ui = zero ? 0 : power_mw(gpu, gpu->instant_window_ns, extra);
        } else if (f->field == FIELD_AVERAGE && gpu->has_average && scope_ok) {
            f->type = 1;
            f->value.ui = zero ? 0 : power_mw(gpu, gpu->average_window_ns, extra);
        } else {
            f->code = NOT_SUPPORTED;
        }
    }
    return OK;
}
#endif

/* ---- slow facts ----------------------------------------------------------------------------------------------- */

#ifndef FAKE_WITHOUT_nvmlDeviceGetUtilizationRates
int nvmlDeviceGetUtilizationRates(void *handle, unsigned out[2]) {
    BOARD("nvmlDeviceGetUtilizationRates")
    if (!gpu->has_utilization) return NOT_SUPPORTED;
    out[0] = gpu->utilization_percent;
    out[1] = 0;
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetMemoryInfo
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long out[3]) {
    BOARD("nvmlDeviceGetMemoryInfo")
    if (!gpu->memory_total) return NOT_SUPPORTED;
    out[0] = gpu->memory_total;
    out[2] = gpu->memory_used + gpu->memory_reserved;
    out[1] = out[0] - out[2];
    return OK;
}
#endif

typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2_t;

#ifndef FAKE_WITHOUT_nvmlDeviceGetMemoryInfo_v2
int nvmlDeviceGetMemoryInfo_v2(void *handle, memory_v2_t *out) {
    BOARD("nvmlDeviceGetMemoryInfo_v2")
    if (!gpu->memory_total) return NOT_SUPPORTED;
    out->total = gpu->memory_total;
    out->reserved = gpu->memory_reserved;
    out->used = gpu->memory_used;
    out->free = out->total - out->reserved - out->used;
    return OK;
}
#endif

typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process_t;

/* A board, or the slice of one: part is NULL for a board. */
#define BOARD_OR_SLICE(name)                                                              \
    int index;                                                                            \
    slice_t *part = slice(handle, &index);                                                \
    gpu_t *gpu = part ? &state->gpus[index] : board(handle, &index);                      \
    CALL(name, index)                                                                     \
    if (!gpu) return INVALID_ARGUMENT;

#ifndef FAKE_WITHOUT_nvmlDeviceGetComputeRunningProcesses_v3
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, process_t *out) {
    BOARD_OR_SLICE("nvmlDeviceGetComputeRunningProcesses_v3")
    if (!part && gpu->mig_mode && gpu->mig_private) return NO_PERMISSION;
    unsigned room = *count, found = 0;
    for (unsigned i = 0; i < gpu->pid_count; i++) {
        unsigned place = gpu->pid_slices[i];
        if (part && (!place || &gpu->slices[place - 1] != part)) continue;
        unsigned instance = place ? gpu->slices[place - 1].gpu_instance : ~0u;
        unsigned compute = place ? gpu->slices[place - 1].compute_instance : ~0u;
        if (out && found < room) out[found] = (process_t){ gpu->pids[i], 1 << 20, instance, compute };
        found++;
    }
    *count = found;
    return found && (!out || room < found) ? INSUFFICIENT_SIZE : OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetGraphicsRunningProcesses_v3
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, process_t *out) {
    BOARD_OR_SLICE("nvmlDeviceGetGraphicsRunningProcesses_v3")
    if (part || gpu->mig_mode) return NOT_SUPPORTED;
    unsigned room = *count;
    *count = gpu->graphics_count;
    if (gpu->graphics_count == 0) return OK;
    if (!out || room < gpu->graphics_count) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < gpu->graphics_count; i++) out[i] = (process_t){ gpu->graphics[i], 1 << 20, ~0u, ~0u };
    return OK;
}
#endif

typedef struct { unsigned pid; unsigned long long t_us; unsigned sm, memory, encoder, decoder; } sample_t;

#ifndef FAKE_WITHOUT_nvmlDeviceGetProcessUtilization
int nvmlDeviceGetProcessUtilization(void *handle, sample_t *out, unsigned *count, unsigned long long since_us) {
    BOARD_OR_SLICE("nvmlDeviceGetProcessUtilization")
    if (part || gpu->mig_mode || gpu->has_loads != 1) return NOT_SUPPORTED;
    unsigned room = *count, found = 0;
    for (unsigned i = 0; i < gpu->load_count; i++) {
        load_t *load = &gpu->loads[i];
        if ((unsigned long long)load->t_us <= since_us || load->t_us > state->epoch_us + now_ns() / 1000) continue;
        if (out && found < room)
            out[found] = (sample_t){ load->pid, (unsigned long long)load->t_us, load->sm, load->memory, 0, 0 };
        found++;
    }
    *count = found;
    if (!found) return NOT_FOUND;
    return !out || room < found ? INSUFFICIENT_SIZE : OK;
}
#endif

typedef struct { unsigned long long t_us; unsigned pid, sm, memory, encoder, decoder, jpeg, ofa; } info_t;
typedef struct { unsigned version, count; unsigned long long since_us; info_t *out; } infos_t;

#ifndef FAKE_WITHOUT_nvmlDeviceGetProcessesUtilizationInfo
int nvmlDeviceGetProcessesUtilizationInfo(void *handle, infos_t *asked) {
    BOARD_OR_SLICE("nvmlDeviceGetProcessesUtilizationInfo")
    if (part || gpu->mig_mode || !gpu->has_loads) return NOT_SUPPORTED;
    unsigned room = asked->count, found = 0;
    for (unsigned i = 0; i < gpu->load_count; i++) {
        load_t *load = &gpu->loads[i];
        if ((unsigned long long)load->t_us <= asked->since_us || load->t_us > state->epoch_us + now_ns() / 1000) continue;
        if (asked->out && found < room)
            asked->out[found] = (info_t){ (unsigned long long)load->t_us, load->pid, load->sm, load->memory, 0, 0, 0, 0 };
        found++;
    }
    asked->count = found;
    if (!found) return NOT_FOUND;
    return !asked->out || room < found ? INSUFFICIENT_SIZE : OK;
}
#endif

/* ---- slices of a board (MIG) ---------------------------------------------------------------------------------- */

#ifndef FAKE_WITHOUT_nvmlDeviceGetMigMode
int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    BOARD("nvmlDeviceGetMigMode")
    if (!gpu->max_slices) return NOT_SUPPORTED;
    *current = *pending = gpu->mig_mode;
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetMaxMigDeviceCount
int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *out) {
    BOARD("nvmlDeviceGetMaxMigDeviceCount")
    *out = gpu->max_slices;
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetMigDeviceHandleByIndex
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned which, void **out) {
    BOARD("nvmlDeviceGetMigDeviceHandleByIndex")
    if (which >= gpu->slice_count) return NOT_FOUND;
    *out = &slices[index][which];
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetDeviceHandleFromMigDeviceHandle
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *handle, void **out) {
    int index;
    slice_t *part = slice(handle, &index);
    CALL("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", index)
    if (!part) return INVALID_ARGUMENT;
    *out = &boards[index];
    return OK;
}
#endif

#define SLICE(name)                                                                       \
    int index;                                                                            \
    slice_t *part = slice(handle, &index);                                                \
    CALL(name, index)                                                                     \
    if (!part) return INVALID_ARGUMENT;

#ifndef FAKE_WITHOUT_nvmlDeviceGetGpuInstanceId
int nvmlDeviceGetGpuInstanceId(void *handle, unsigned *out) {
    SLICE("nvmlDeviceGetGpuInstanceId")
    *out = part->gpu_instance;
    return OK;
}
#endif

#ifndef FAKE_WITHOUT_nvmlDeviceGetComputeInstanceId
int nvmlDeviceGetComputeInstanceId(void *handle, unsigned *out) {
    SLICE("nvmlDeviceGetComputeInstanceId")
    *out = part->compute_instance;
    return OK;
}
#endif

typedef struct {
    unsigned multiprocessors, copy, decoder, encoder, jpeg, ofa, gpu_slices, compute_slices;
    unsigned long long memory_mb;
} attributes_t;

#ifndef FAKE_WITHOUT_nvmlDeviceGetAttributes_v2
int nvmlDeviceGetAttributes_v2(void *handle, attributes_t *out) {
    SLICE("nvmlDeviceGetAttributes_v2")
    if (!part->compute_slices) return NOT_SUPPORTED;
    memset(out, 0, sizeof *out);
    out->gpu_slices = part->gpu_slices;
    out->compute_slices = part->compute_slices;
    out->memory_mb = part->memory_mb;
    return OK;
}
#endif
