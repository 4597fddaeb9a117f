//! How much is freed where the cells run out: one rule for a session and for a guest.

use crate::policy::Params;

/// Of all cells, what is freed at once: each time costs a vote, and cells that are free hold nothing.
const FREED: f64 = 0.25;

/// Of `limit` cells, those that are freed at once.
pub(crate) fn freed_at_once(limit: usize) -> usize {
    (FREED * limit as f64) as usize
}

/// How many of `limit` cells may stay, if `needed` of them have to be free; none where more than `always` do always.
pub(crate) fn most_cells(always: usize, limit: usize, needed: usize) -> Option<usize> {
    let most = limit.saturating_sub(needed.max(freed_at_once(limit)));
    (most > always).then_some(most)
}

/// Cells that always stay.
pub(crate) fn least_cells(policy: &Params) -> usize {
    policy.sinks + policy.recent
}

/// The fewest cells with which [`most_cells`] has an answer for a few needed ones.
pub(crate) fn least_limit(always: usize) -> usize {
    ((always + 1) as f64 / (1.0 - FREED)).ceil() as usize
}
