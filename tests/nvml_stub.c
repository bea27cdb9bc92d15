/* A driver's library with one GPU and one MIG instance of it, for the real pynvml to run over: no device, no driver.
 *
 * Values are set by name with stub_set, and faults by function with stub_fault: after so many good calls the function
 * answers the code so many times (times < 0: for ever). Build with -DOLD_DRIVER for a library without newer functions.
 */
#include <stdio.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };

static struct { char name[64]; unsigned long long value; } values[256];
static struct { char function[64]; int code, after, times; } faults[32];
static char gpu, mig;

void stub_reset(void) {
    memset(values, 0, sizeof values);
    memset(faults, 0, sizeof faults);
}

void stub_set(const char *name, unsigned long long value) {
    for (int i = 0; i < 256; i++)
        if (!values[i].name[0] || !strcmp(values[i].name, name)) {
            snprintf(values[i].name, sizeof values[i].name, "%s", name);
            values[i].value = value;
            return;
        }
}

void stub_fault(const char *function, int code, int after, int times) {
    for (int i = 0; i < 32; i++)
        if (!faults[i].function[0]) {
            snprintf(faults[i].function, sizeof faults[i].function, "%s", function);
            faults[i].code = code, faults[i].after = after, faults[i].times = times;
            return;
        }
}

static unsigned long long get(const char *name) {
    for (int i = 0; i < 256 && values[i].name[0]; i++)
        if (!strcmp(values[i].name, name)) return values[i].value;
    return 0;
}

static unsigned long long numbered(const char *name, int number) {
    char full[64];
    snprintf(full, sizeof full, "%s %d", name, number);
    return get(full);
}

static int fault(const char *function) {
    for (int i = 0; i < 32 && faults[i].function[0]; i++)
        if (!strcmp(faults[i].function, function)) {
            if (faults[i].after > 0) return faults[i].after--, SUCCESS;
            if (faults[i].times == 0) continue;
            if (faults[i].times > 0) faults[i].times--;
            return faults[i].code;
        }
    return SUCCESS;
}

#define MAY_FAIL do { int code = fault(__func__); if (code) return code; } while (0)
/* What belongs to the whole GPU is not offered for a MIG instance. */
#define OF_THE_BOARD do { MAY_FAIL; if (device == &mig) return NOT_SUPPORTED; } while (0)

int nvmlInitWithFlags(unsigned flags) { (void)flags; MAY_FAIL; return SUCCESS; }
int nvmlShutdown(void) { MAY_FAIL; return SUCCESS; }
const char *nvmlErrorString(int code) { (void)code; return "an error that the stub does not name"; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    MAY_FAIL;
    snprintf(version, length, "580.%llu", get("driver"));
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) { MAY_FAIL; *count = 1; return SUCCESS; }

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    MAY_FAIL;
    if (!strcmp(uuid, "GPU-one")) *device = &gpu;
    else if (!strcmp(uuid, "MIG-part")) *device = &mig;
    else return NOT_FOUND;
    return SUCCESS;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *device, void **board) {
    MAY_FAIL;
    *board = &gpu;
    return device == &mig ? SUCCESS : NOT_FOUND;
}

typedef unsigned long long u64;
typedef struct { u64 total, free, used; } memory_v1;
typedef struct { unsigned version; u64 total, reserved, free, used; } memory_v2;

int nvmlDeviceGetMemoryInfo(void *device, memory_v1 *memory) {
    (void)device;
    MAY_FAIL;
    memory->total = get("total"), memory->free = get("free"), memory->used = get("used") + get("reserved");
    return SUCCESS;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2 *memory) {
    (void)device;
    MAY_FAIL;
    if (memory->version != 0x02000028) return 25;
    memory->total = get("total"), memory->free = get("free");
    memory->used = get("used"), memory->reserved = get("reserved");
    return SUCCESS;
}

typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    int type, code;
    union { unsigned narrow; u64 wide; } value;
} field_value;

int nvmlDeviceGetFieldValues(void *device, int count, field_value *fields) {
    OF_THE_BOARD;
    for (int i = 0; i < count; i++) {
        int number = (int)fields[i].field;
        fields[i].code = (int)numbered("code", number);
        fields[i].type = (int)numbered("type", number);
        fields[i].value.wide = numbered("field", number);
    }
    return SUCCESS;
}
#endif

typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } process;

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process *found) {
    (void)device;
    MAY_FAIL;
    unsigned there = (unsigned)get("processes"), room = *count;
    *count = there;
    if (room < there) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < there; i++)
        found[i].pid = (unsigned)numbered("pid", (int)i), found[i].used = numbered("bytes", (int)i);
    return SUCCESS;
}

typedef struct { unsigned gpu, memory; u64 peak, time, start; unsigned running, reserved[5]; } accounting;

int nvmlDeviceGetAccountingStats(void *device, unsigned pid, accounting *found) {
    (void)device;
    MAY_FAIL;
    if (pid != get("accounted pid")) return NOT_FOUND;
    memset(found, 0, sizeof *found);
    found->peak = get("accounted peak");
    return SUCCESS;
}

#define NUMBER(FUNCTION, TYPE, NAME) \
    int FUNCTION(void *device, TYPE *value) { OF_THE_BOARD; *value = (TYPE)get(NAME); return SUCCESS; }
#define KIND(FUNCTION, NAME) \
    int FUNCTION(void *device, int kind, unsigned *value) { (void)kind; OF_THE_BOARD; *value = (unsigned)get(NAME); return SUCCESS; }
#define MODE(FUNCTION, NAME) \
    int FUNCTION(void *device, unsigned *now, unsigned *then) { OF_THE_BOARD; *now = *then = (unsigned)get(NAME); return SUCCESS; }

NUMBER(nvmlDeviceGetTotalEnergyConsumption, u64, "millijoules")
NUMBER(nvmlDeviceGetPowerUsage, unsigned, "milliwatts")
NUMBER(nvmlDeviceGetEnforcedPowerLimit, unsigned, "limit")
NUMBER(nvmlDeviceGetCurrentClocksEventReasons, u64, "reasons")
NUMBER(nvmlDeviceGetAccountingMode, unsigned, "accounting")
NUMBER(nvmlDeviceGetComputeMode, unsigned, "compute mode")
NUMBER(nvmlDeviceGetPersistenceMode, unsigned, "persistence")
KIND(nvmlDeviceGetClockInfo, "clock")
KIND(nvmlDeviceGetMaxClockInfo, "most clock")
KIND(nvmlDeviceGetTemperature, "celsius")
MODE(nvmlDeviceGetEccMode, "ecc")
MODE(nvmlDeviceGetMigMode, "mig")
