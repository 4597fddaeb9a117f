//! Votes, and their reports as C structs.

use std::ops::ControlFlow;
use std::ptr::NonNull;

use super::handle::{Core, Failure};
use super::header::*;
use super::{params, ptr};
use crate::attach::{AttachError, Attachment};
use crate::llama::Token;
use crate::policy::Bound;
use crate::sys::llama_context;
use crate::vote::{CompressReport, Stage};

/// Called at each stage of a vote.
type Progress<'a> = &'a dyn Fn(Stage) -> ControlFlow<()>;

pub(super) fn vote(
    core: &mut Core,
    ctx: *mut llama_context,
    seq: i32,
    is_rehearsal: bool,
    report: *mut gvote_report,
) -> Result<(), Failure> {
    let verb = if is_rehearsal { "would keep" } else { "keeps" };
    told(core, ctx, seq, verb, report, |attachment, ctx, progress| {
        attachment.compress(ctx, seq, is_rehearsal, progress).map(Some)
    })?;
    Ok(())
}

/// Votes on an answer if a vote is due. Returns whether there was a vote.
pub(super) fn vote_if_due(
    core: &mut Core,
    ctx: *mut llama_context,
    seq: i32,
    start: i32,
    report: *mut gvote_report,
) -> Result<bool, Failure> {
    told(core, ctx, seq, "keeps", report, |attachment, ctx, progress| attachment.vote_if_due(ctx, seq, start, progress))
}

pub(super) fn make_room(
    core: &mut Core,
    ctx: *mut llama_context,
    seq: i32,
    needed: u32,
    ahead: &[Token],
    report: *mut gvote_report,
) -> Result<(), Failure> {
    told(core, ctx, seq, "keeps", report, |attachment, ctx, progress| {
        attachment.make_room(ctx, seq, needed as usize, ahead, progress).map(Some)
    })?;
    Ok(())
}

/// Runs a vote with the app's progress callback, logs the result, and fills the app's report. Returns whether there was
/// a vote.
fn told(
    core: &mut Core,
    ctx: *mut llama_context,
    seq: i32,
    verb: &str,
    report: *mut gvote_report,
    work: impl FnOnce(&mut Attachment, NonNull<llama_context>, Progress) -> Result<Option<CompressReport>, AttachError>,
) -> Result<bool, Failure> {
    let ctx = ptr::context(ctx)?;
    let is_known = params::is_known_size::<gvote_report>;
    if !report.is_null() {
        // check the size before anything changes
        ptr::size_in(report, "gvote_report", is_known)?;
    }
    let told = core.progress;
    let progress = |stage: Stage| match told {
        // SAFETY: the app's own callback and data.
        Some((callback, data)) if !unsafe { callback(stage_number(stage), data) } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let Some(done) = work(&mut core.attachment, ctx, &progress)? else { return Ok(false) };
    let bytes_aside = core.attachment.bytes_aside(ctx, seq).unwrap_or(0);
    let (before, after) = (done.cells_before, done.cells_after);
    core.tell(
        GVOTE_LOG_INFO,
        &format!(
            "sequence {seq} {verb} {after} of {before} cells ({:?}, {:.3} s)",
            done.bound,
            done.time().as_secs_f64()
        ),
    );
    if !report.is_null() {
        ptr::write_sized(report, "gvote_report", &of(&done, bytes_aside), is_known)?;
    }
    Ok(true)
}

fn stage_number(stage: Stage) -> gvote_stage {
    match stage {
        Stage::Replay => GVOTE_STAGE_REPLAY,
        Stage::Probe => GVOTE_STAGE_PROBE,
        Stage::Score => GVOTE_STAGE_SCORE,
        Stage::Draft => GVOTE_STAGE_DRAFT,
        Stage::Try => GVOTE_STAGE_TRY,
        Stage::Compact => GVOTE_STAGE_COMPACT,
    }
}

fn of(done: &CompressReport, bytes_aside: usize) -> gvote_report {
    let mut tried = [gvote_try::default(); GVOTE_MAX_TRIED as usize];
    for (to, &(cells, kl)) in tried.iter_mut().zip(&done.tried) {
        *to = gvote_try { cells: cells as u32, kl };
    }
    gvote_report {
        size: size_of::<gvote_report>(),
        policy: params::policy_number(done.policy),
        bound: match done.bound {
            Bound::All => GVOTE_BOUND_ALL,
            Bound::Trial => GVOTE_BOUND_TRIAL,
            Bound::LostMass => GVOTE_BOUND_LOST_MASS,
            Bound::Blind => GVOTE_BOUND_BLIND,
            Bound::Budget => GVOTE_BOUND_BUDGET,
            Bound::Ratio => GVOTE_BOUND_RATIO,
            Bound::MaxCells => GVOTE_BOUND_MAX_CELLS,
            Bound::MinCells => GVOTE_BOUND_MIN_CELLS,
            Bound::Forced => GVOTE_BOUND_FORCED,
        },
        cells_before: done.cells_before as u32,
        cells_after: done.cells_after as u32,
        kv_bytes_before: done.kv_bytes_before as u64,
        kv_bytes_after: done.kv_bytes_after as u64,
        lost_mass: done.lost_mass.unwrap_or(f32::NAN),
        rounding: done.rounding,
        n_tried: done.tried.len().min(tried.len()) as u32,
        tried,
        rows_back: done.rows_back as u32,
        compute_bytes: done.compute_bytes as u64,
        replay_s: done.replay_time.as_secs_f64(),
        probe_s: done.probe_time.as_secs_f64(),
        score_s: done.score_time.as_secs_f64(),
        select_s: done.select_time.as_secs_f64(),
        trial_s: done.trial_time.as_secs_f64(),
        compact_s: done.compact_time.as_secs_f64(),
        aside_s: done.aside_time.as_secs_f64(),
        bytes_aside: bytes_aside as u64,
        recall_s: done.recall_time.as_secs_f64(),
    }
}
