//! Resident set size of this process, as reported by Linux.

use std::fs;

/// Value for `/proc/PID/clear_refs` that resets the peak to the current resident set.
const RESET_PEAK: &str = "5";

/// Resets the peak and returns the bytes resident now; None if the kernel does not report them.
pub fn start() -> Option<usize> {
    fs::write("/proc/self/clear_refs", RESET_PEAK).ok()?;
    peak()
}

/// Returns the largest resident set since [`start`], in bytes.
pub fn peak() -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: usize = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}
