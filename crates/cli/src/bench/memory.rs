//! The resident set of this process, as Linux tells it.

use std::fs;

/// `/proc/PID/clear_refs`: sets the peak to what is resident now.
const RESET_PEAK: &str = "5";

/// Sets the peak back, and returns the bytes that are resident now; None where the kernel does not tell.
pub fn start() -> Option<usize> {
    fs::write("/proc/self/clear_refs", RESET_PEAK).ok()?;
    peak()
}

/// The most bytes that were resident since [`start`].
pub fn peak() -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: usize = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}
