//! How fast memory is, for routers that compare tiers.

use std::time::Instant;

use crate::caps;

/// Bytes a second that one thread copies in memory. Takes some 20 ms.
pub fn measure() -> f64 {
    let from = vec![1u8; caps::COPY_MEASURED_BYTES];
    let mut to = vec![0u8; caps::COPY_MEASURED_BYTES];
    let copy = |_| {
        let started = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&to);
        started.elapsed()
    };
    let fastest = (0..4).map(copy).min().unwrap_or_default();
    from.len() as f64 / fastest.as_secs_f64().max(1e-9)
}
