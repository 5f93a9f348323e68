/* Stands in for libnvidia-ml.so.1 below the real binding: devices whose power, counters and failures are scripted.
 *
 * Time is `now` when that is not negative, else the monotonic clock of the system. A device's power is a square wave;
 * its counter shows the energy since it was last reset, as of the last multiple of its period. */

#include <math.h>
#include <string.h>
#include <time.h>

#define SUCCESS 0
#define INVALID_ARGUMENT 2
#define NOT_SUPPORTED 3
#define NOT_FOUND 6
#define GPU_IS_LOST 15

typedef struct {
    char uuid[96];
    char name[96];
    double low_watts, high_watts, wave_s, duty;
    double period_s;   /* of the counter */
    double resets_at;  /* the counter begins again; negative: never */
    double lost_at, found_at;
    double mean_s;     /* over which the power sensor takes its mean; 0: it does not */
    double limit_watts, module_watts;
    int energy_error, power_error, handle_error, mig;
    unsigned long long memory_bytes, memory_used_bytes, reasons, ecc_errors;
    unsigned int major, minor, mhz[4], mhz_most[4]; /* graphics, SM, memory, video */
    unsigned int default_watts, pcie[2], pcie_most[2]; /* generation, width */
    unsigned int links, links_down, no_peers; /* how many; masks of links and of devices */
    int ecc;
} device_t;

device_t devices[8];
unsigned int device_count; /* those behind it are found by their UUID only */
int init_error;
double now, latency_s;
char failing[64]; /* the name of a query that fails on every device, and with what */
int failing_code;

#define ASKED(query)                                                                                                   \
    if (!strcmp(failing, query))                                                                                       \
    return failing_code

static double clock_s(void) {
    struct timespec at;
    if (now >= 0) {
        now += latency_s;
        return now;
    }
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec * 1e-9;
}

static double watts(const device_t *d, double t) {
    return d->wave_s > 0 && fmod(t, d->wave_s) >= d->duty * d->wave_s ? d->low_watts : d->high_watts;
}

static double joules(const device_t *d, double t) {
    if (d->wave_s <= 0)
        return d->high_watts * t;
    double waves = floor(t / d->wave_s), rest = t - waves * d->wave_s, high_s = d->duty * d->wave_s;
    double whole = high_s * d->high_watts + (d->wave_s - high_s) * d->low_watts;
    return waves * whole + fmin(rest, high_s) * d->high_watts + fmax(rest - high_s, 0) * d->low_watts;
}

static int failed(const device_t *d, double t) {
    return d->lost_at >= 0 && t >= d->lost_at && !(d->found_at >= 0 && t >= d->found_at) ? GPU_IS_LOST : SUCCESS;
}

int nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    return init_error;
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) {
    (void)code;
    return "an error of the stand-in";
}

int nvmlDeviceGetCount_v2(unsigned int *count) {
    ASKED("nvmlDeviceGetCount_v2");
    *count = device_count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, device_t **device) {
    if (index >= device_count)
        return INVALID_ARGUMENT;
    *device = &devices[index];
    return devices[index].handle_error;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, device_t **device) {
    for (int i = 0; i < 8; i++)
        if (devices[i].uuid[0] && !strcmp(devices[i].uuid, uuid)) {
            *device = &devices[i];
            return devices[i].handle_error;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(device_t *device, char *uuid, unsigned int length) {
    strncpy(uuid, device->uuid, length);
    return SUCCESS;
}

int nvmlDeviceGetName(device_t *device, char *name, unsigned int length) {
    ASKED("nvmlDeviceGetName");
    strncpy(name, device->name, length);
    return SUCCESS;
}

int nvmlDeviceGetMigMode(device_t *device, unsigned int *current, unsigned int *pending) {
    ASKED("nvmlDeviceGetMigMode");
    if (device->mig < 0)
        return NOT_SUPPORTED;
    *current = *pending = (unsigned int)device->mig;
    return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(device_t *device, unsigned int *milliwatts) {
    ASKED("nvmlDeviceGetEnforcedPowerLimit");
    if (device->limit_watts <= 0)
        return NOT_SUPPORTED;
    *milliwatts = (unsigned int)(device->limit_watts * 1e3);
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(device_t *device, unsigned long long *millijoules) {
    ASKED("nvmlDeviceGetTotalEnergyConsumption");
    double t = clock_s();
    if (device->energy_error)
        return device->energy_error;
    if (failed(device, t))
        return failed(device, t);
    double shown = device->period_s > 0 ? floor(t / device->period_s) * device->period_s : t;
    double since = device->resets_at >= 0 && t >= device->resets_at ? device->resets_at : 0;
    *millijoules = (unsigned long long)(1e3 * fmax(joules(device, shown) - joules(device, since), 0));
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(device_t *device, unsigned int *milliwatts) {
    double t = clock_s();
    if (device->power_error)
        return device->power_error;
    if (failed(device, t))
        return failed(device, t);
    double shown = device->mean_s > 0 ? (joules(device, t) - joules(device, t - device->mean_s)) / device->mean_s
                                      : watts(device, t);
    *milliwatts = (unsigned int)(shown * 1e3);
    return SUCCESS;
}

typedef struct {
    unsigned int field, scope;
    long long timestamp, latency;
    int kind, result;
    union {
        double real;
        unsigned int whole;
        unsigned long long wide;
    } value;
} field_t;

int nvmlDeviceGetFieldValues(device_t *device, int count, field_t *fields) {
    for (int i = 0; i < count; i++) {
        int known = fields[i].field == 186 && fields[i].scope == 1 && device->module_watts > 0;
        fields[i].result = known ? SUCCESS : NOT_SUPPORTED;
        fields[i].value.whole = (unsigned int)(device->module_watts * 1e3);
    }
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    ASKED("nvmlSystemGetDriverVersion");
    strncpy(version, "580.65.06", length);
    return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    ASKED("nvmlSystemGetCudaDriverVersion_v2");
    *version = 13010;
    return SUCCESS;
}

typedef struct {
    unsigned long long total, free, used;
} memory_t;

int nvmlDeviceGetMemoryInfo(device_t *device, memory_t *memory) {
    ASKED("nvmlDeviceGetMemoryInfo");
    memory->total = device->memory_bytes;
    memory->used = device->memory_used_bytes;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(device_t *device, int *major, int *minor) {
    ASKED("nvmlDeviceGetCudaComputeCapability");
    *major = (int)device->major;
    *minor = (int)device->minor;
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(device_t *device, int clock, unsigned int *mhz) {
    ASKED("nvmlDeviceGetClockInfo");
    *mhz = device->mhz[clock];
    return SUCCESS;
}

int nvmlDeviceGetMaxClockInfo(device_t *device, int clock, unsigned int *mhz) {
    ASKED("nvmlDeviceGetMaxClockInfo");
    *mhz = device->mhz_most[clock];
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksEventReasons(device_t *device, unsigned long long *reasons) {
    ASKED("nvmlDeviceGetCurrentClocksEventReasons");
    *reasons = device->reasons;
    return SUCCESS;
}

int nvmlDeviceGetEccMode(device_t *device, int *current, int *pending) {
    ASKED("nvmlDeviceGetEccMode");
    *current = *pending = device->ecc;
    return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(device_t *device, int kind, int counter, unsigned long long *errors) {
    ASKED("nvmlDeviceGetTotalEccErrors");
    *errors = kind == 1 && counter == 0 ? device->ecc_errors : 99;
    return SUCCESS;
}

int nvmlDeviceGetPowerManagementDefaultLimit(device_t *device, unsigned int *milliwatts) {
    ASKED("nvmlDeviceGetPowerManagementDefaultLimit");
    *milliwatts = device->default_watts * 1000;
    return SUCCESS;
}

int nvmlDeviceGetCurrPcieLinkGeneration(device_t *device, unsigned int *generation) {
    ASKED("nvmlDeviceGetCurrPcieLinkGeneration");
    *generation = device->pcie[0];
    return SUCCESS;
}

int nvmlDeviceGetCurrPcieLinkWidth(device_t *device, unsigned int *width) {
    ASKED("nvmlDeviceGetCurrPcieLinkWidth");
    *width = device->pcie[1];
    return SUCCESS;
}

int nvmlDeviceGetMaxPcieLinkGeneration(device_t *device, unsigned int *generation) {
    ASKED("nvmlDeviceGetMaxPcieLinkGeneration");
    *generation = device->pcie_most[0];
    return SUCCESS;
}

int nvmlDeviceGetMaxPcieLinkWidth(device_t *device, unsigned int *width) {
    ASKED("nvmlDeviceGetMaxPcieLinkWidth");
    *width = device->pcie_most[1];
    return SUCCESS;
}

int nvmlDeviceGetNvLinkState(device_t *device, unsigned int link, int *active) {
    ASKED("nvmlDeviceGetNvLinkState");
    if (link >= device->links)
        return device->links ? INVALID_ARGUMENT : NOT_SUPPORTED;
    *active = !(device->links_down >> link & 1);
    return SUCCESS;
}

int nvmlDeviceGetP2PStatus(device_t *one, device_t *other, int what, int *status) {
    ASKED("nvmlDeviceGetP2PStatus");
    *status = what == 0 && !(one->no_peers >> (other - devices) & 1) ? 0 : 4;
    return SUCCESS;
}
