//! Settings as C structs.

#![forbid(unsafe_code)]

use std::path::Path;
use std::ptr::null;

use super::handle::Failure;
use super::header::*;
use super::ptr;
use crate::attach::Settings;
use crate::policy::{Evict, Kind, Params, Span};
use crate::session::{Recall, RecallFile, RecallType, When};

const POLICIES: [(gvote_policy, Kind); 8] = [
    (GVOTE_POLICY_GVOTE, Kind::Gvote),
    (GVOTE_POLICY_GVOTE_PAPER, Kind::GvotePaper),
    (GVOTE_POLICY_FULL, Kind::Full),
    (GVOTE_POLICY_STREAMING_LLM, Kind::StreamingLlm),
    (GVOTE_POLICY_SNAPKV, Kind::SnapKv),
    (GVOTE_POLICY_ADAKV, Kind::AdaKv),
    (GVOTE_POLICY_EXPECTED_ATTENTION, Kind::ExpectedAttention),
    (GVOTE_POLICY_KEYDIFF, Kind::KeyDiff),
];
const EVICTS: [(gvote_evict, Evict); 2] =
    [(GVOTE_EVICT_COMPOSITE, Evict::Composite), (GVOTE_EVICT_CELLS, Evict::Cells)];
const RECALL_TYPES: [(gvote_recall_type, RecallType); 2] =
    [(GVOTE_RECALL_TYPE_CACHE, RecallType::Cache), (GVOTE_RECALL_TYPE_Q8_0, RecallType::Q8_0)];

/// Granularity of struct sizes: structs grow at the end, by fields of four and eight bytes, and shorter ones remain
/// valid.
const STEP: usize = 8;

/// Whether a caller may have been compiled with a struct of this size.
pub(super) fn is_known_size<T>(size: usize) -> bool {
    (2 * STEP..=size_of::<T>()).contains(&size) && size.is_multiple_of(STEP)
}

pub(super) fn unknown_size(what: &str, size: usize, ours: usize) -> Failure {
    let text = format!("{what}.size is {size}, but this library knows sizes up to {ours}: set it to sizeof({what})");
    Failure::new(GVOTE_ERROR_SIZE, text)
}

pub(super) fn policy_number(kind: Kind) -> gvote_policy {
    POLICIES.iter().find(|entry| entry.1 == kind).map_or(GVOTE_POLICY_GVOTE, |entry| entry.0)
}

/// Converts settings to the C struct.
pub(super) fn of(settings: &Settings) -> gvote_params {
    let Settings { policy: params, account_error, recall, recall_type, when } = settings;
    let evict = EVICTS.iter().find(|entry| entry.1 == params.evict).map_or(GVOTE_EVICT_COMPOSITE, |entry| entry.0);
    let (recall, recall_file) = match recall {
        Recall::Auto => (GVOTE_RECALL_AUTO, null()),
        Recall::Off => (GVOTE_RECALL_OFF, null()),
        Recall::File(file) => (GVOTE_RECALL_FILE, file.name().as_ptr()),
    };
    let (when, vote_after) = match *when {
        When::Auto => (GVOTE_WHEN_AUTO, 0),
        When::After(n) => (GVOTE_WHEN_AFTER, n),
        When::Prompt => (GVOTE_WHEN_NEVER, 0),
    };
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    gvote_params {
        size: size_of::<gvote_params>(),
        policy: policy_number(params.policy),
        evict,
        flags: flag(params.replay, GVOTE_FLAG_REPLAY)
            | flag(*account_error, GVOTE_FLAG_ACCOUNT_ERROR)
            | flag(params.protect, GVOTE_FLAG_PROTECT),
        target_kl: params.target_kl.unwrap_or(0.0),
        lost_mass: params.lost_mass,
        ratio: params.ratio.unwrap_or(0.0),
        max_cells: number(params.max_cells.unwrap_or(0)),
        min_cells: number(params.min_cells),
        sinks: number(params.sinks),
        recent: number(params.recent),
        window: number(params.window),
        samples: number(params.samples),
        draft: number(params.draft),
        span_back: number(params.span.back),
        span_forward: number(params.span.forward),
        pool: number(params.pool),
        head_mix: params.head_mix,
        p_nuc: params.p_nuc,
        seed: params.seed,
        recall,
        recall_type: RECALL_TYPES.iter().find(|entry| entry.1 == *recall_type).map_or(0, |entry| entry.0),
        recall_file,
        when,
        vote_after: number(vote_after),
    }
}

/// Settings that apply where the app passes none.
fn default_settings() -> Settings {
    Settings { recall: Recall::Auto, when: When::Auto, ..Settings::default() }
}

pub(super) fn defaults() -> gvote_params {
    of(&default_settings())
}

/// Fills the caller's struct.
pub(super) fn write(to: *mut gvote_params, params: &gvote_params) -> Result<(), Failure> {
    ptr::write_sized(to, "gvote_params", params, is_known_size::<gvote_params>)
}

/// Converts the caller's settings; NULL means the defaults. [`crate::attach::Attachment`] checks their bounds. `now`: present
/// destination of rows that leave the cache. A recall file with the same path is reused, not created again.
pub(super) fn read(from: *const gvote_params, now: &Recall) -> Result<Settings, Failure> {
    if from.is_null() {
        return Ok(default_settings());
    }
    let params = ptr::read_sized(from, "gvote_params", defaults(), is_known_size::<gvote_params>)?;
    let unknown =
        |name: &str, value: u32| Failure::new(GVOTE_ERROR_PARAMS, format!("{name} is {value}, which is none"));
    let policy = POLICIES.iter().find(|entry| entry.0 == params.policy);
    let evict = EVICTS.iter().find(|entry| entry.0 == params.evict);
    let recall_type = RECALL_TYPES.iter().find(|entry| entry.0 == params.recall_type);
    if params.flags & !(GVOTE_FLAG_REPLAY | GVOTE_FLAG_ACCOUNT_ERROR | GVOTE_FLAG_PROTECT) != 0 {
        return Err(unknown("flags", params.flags));
    }
    let has = |flag: u32| params.flags & flag != 0;
    // 0 means none; other values out of bounds must be refused
    let optional = |x: f32| if x == 0.0 { None } else { Some(x) };
    let policy = Params {
        policy: policy.ok_or_else(|| unknown("policy", params.policy))?.1,
        evict: evict.ok_or_else(|| unknown("evict", params.evict))?.1,
        replay: has(GVOTE_FLAG_REPLAY),
        target_kl: optional(params.target_kl),
        lost_mass: params.lost_mass,
        ratio: optional(params.ratio),
        max_cells: (params.max_cells > 0).then_some(params.max_cells as usize),
        min_cells: params.min_cells as usize,
        sinks: params.sinks as usize,
        recent: params.recent as usize,
        window: params.window as usize,
        samples: params.samples as usize,
        draft: params.draft as usize,
        span: Span { back: params.span_back as usize, forward: params.span_forward as usize },
        pool: params.pool as usize,
        head_mix: params.head_mix,
        p_nuc: params.p_nuc,
        seed: params.seed,
        protect: has(GVOTE_FLAG_PROTECT),
        exact: false,
    };
    Ok(Settings {
        policy,
        account_error: has(GVOTE_FLAG_ACCOUNT_ERROR),
        recall: match params.recall {
            GVOTE_RECALL_AUTO => Recall::Auto,
            GVOTE_RECALL_OFF => Recall::Off,
            GVOTE_RECALL_FILE => in_file(Path::new(ptr::text(params.recall_file, "recall_file")?), now)?,
            other => return Err(unknown("recall", other)),
        },
        recall_type: recall_type.ok_or_else(|| unknown("recall_type", params.recall_type))?.1,
        when: match params.when {
            GVOTE_WHEN_AUTO => When::Auto,
            GVOTE_WHEN_AFTER => When::After(params.vote_after as usize),
            GVOTE_WHEN_NEVER => When::Prompt,
            other => return Err(unknown("when", other)),
        },
    })
}

fn in_file(path: &Path, now: &Recall) -> Result<Recall, Failure> {
    if matches!(now, Recall::File(file) if file.path() == path) {
        return Ok(now.clone());
    }
    let made = RecallFile::create(path);
    made.map(Recall::File).map_err(|error| Failure::new(GVOTE_ERROR_FILE, format!("recall_file: {error}")))
}
