//! The daemon's clock.

use kvstore_tiers::BootTime;
use rustix::time::{ClockId, clock_gettime};

/// Now, on CLOCK_BOOTTIME.
pub fn now() -> BootTime {
    let time = clock_gettime(ClockId::Boottime);
    BootTime(time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000)
}
