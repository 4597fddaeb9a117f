//! Renders an explanation as an HTML page.

mod plot;

use std::time::Duration;

use gvote::explain::{Explanation, shown};
use gvote::policy::Bound;
use gvote_eval::page;
use gvote_eval::provenance::command_words;
use minijinja::context;
use minijinja::value::Serde;
use serde::Serialize;

use self::plot::Panel;

const PAGE: &str = include_str!("page/page.html");
const PARTS: [(&str, &str); 2] =
    [("page.css", include_str!("page/page.css")), ("page.js", include_str!("page/page.js"))];
/// Digits of the values of a curve; a pixel cannot show more.
const DIGITS: usize = 3;

/// Facts about the request that the vote does not know.
#[derive(Debug, Clone)]
pub struct About {
    /// Name of the model.
    pub model: String,
    /// Words of the command line.
    pub command: Vec<String>,
    /// Report in words: labels and lines.
    pub lines: Vec<(String, String)>,
    /// Time to read the prompt.
    pub prefill: Duration,
}

/// A token of the text.
#[derive(Serialize)]
struct Token {
    text: String,
    heads: u32,
    /// Of these heads, those that had lost the token in the meantime.
    back: u32,
}

/// Data for the page's script.
#[derive(Serialize)]
struct Data<'a> {
    n: usize,
    layers: &'a [i32],
    heads_per_layer: usize,
    kept: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    back: Option<String>,
    real: Vec<f64>,
    synthetic: Vec<f64>,
}

/// A step of the vote and its time.
#[derive(Serialize)]
struct Step {
    name: &'static str,
    seconds: f64,
    /// Percentage of all steps, 0 to 100.
    percent: f64,
}

/// Renders one page without external resources. `about`: facts that the vote does not know.
pub fn render(explanation: &Explanation, about: &About) -> String {
    let Explanation { texts, kept_by, layers, n_head_kv, real, synthetic, report, .. } = explanation;
    // the shading of a newline needs a visible character
    let visible = |text: &String| text.replace('\n', "⏎\n");
    let recall = explanation.recall.as_ref();
    let back = |at: usize| recall.map_or(0, |recall| recall.came_back_by[at]);
    let tokens = texts.iter().zip(kept_by).enumerate();
    let tokens: Vec<Token> =
        tokens.map(|(at, (text, &heads))| Token { text: visible(text), heads, back: back(at) }).collect();
    let data = Data {
        n: texts.len(),
        layers,
        heads_per_layer: *n_head_kv,
        kept: explanation.kept.to_base64(),
        back: recall.map(|recall| recall.came_back.to_base64()),
        real: rounded(real),
        synthetic: rounded(synthetic),
    };
    let command = shown(&[command_words(&about.command).join(" ").into_bytes()]).concat();
    page::render(
        PAGE,
        &PARTS,
        context! {
            model => about.model.clone(),
            command => command,
            lines => about.lines.clone(),
            n_heads => explanation.n_heads(),
            n_layers => layers.len(),
            heads_per_layer => n_head_kv,
            n_tokens => texts.len(),
            tokens => Serde(tokens),
            data => Serde(data),
            budget => Serde(budget(explanation)),
            by_layer => Serde(by_layer(explanation)),
            draft => explanation.draft.concat(),
            recall => recall.map(Serde),
            steps => Serde(steps(explanation, about.prefill)),
            memory => Serde([("before", report.kv_bytes_before, report.cells_before), ("after", report.kv_bytes_after, report.cells_after)]),
            percent_kept => percent(report.share()),
            scoring => report.compute_bytes,
            version => env!("CARGO_PKG_VERSION"),
        },
    )
}

/// Returns panels about the number of cells.
fn budget(explanation: &Explanation) -> Vec<Panel> {
    let (report, policy) = (&explanation.report, &explanation.policy);
    let target = policy.target_kl.unwrap_or_default();
    let chose = match report.bound {
        Bound::Trial => "The fewest that came close enough were taken.",
        Bound::MaxCells => "--max-cells capped what was taken.",
        Bound::MinCells => "--min-cells raised what was taken.",
        _ => "Another rule than the trial had the last word.",
    };
    let trial = format!(
        "The full cache wrote a continuation; each number of cells was tried on it. {chose} The bar is {} nats, {:.0} % of \
         the {target} that the whole answer may drift (--target-kl): what comes later drifts further. What rounding alone \
         causes, {}, is taken off.",
        significant(f64::from(explanation.bar.unwrap_or_default())),
        percent(f64::from(explanation.bar.unwrap_or_default() / target)),
        significant(f64::from(report.rounding)),
    );
    let lost = report.lost_mass.map_or_else(String::new, |lost| format!("{:.1} %", percent(f64::from(lost))));
    let mass = if policy.replay { "the repeated text" } else { "synthetic queries and the current one" };
    let curve = format!(
        "Share of the attention of {mass} that falls on dropped keys, mean over all heads, for each number of cells. With \
         what was chosen it is {lost}. --lost-mass lets this curve decide instead of a trial."
    );
    [plot::trial(explanation, trial), plot::lost_mass(explanation, curve)].into_iter().flatten().collect()
}

/// Returns panels about differences between layers.
fn by_layer(explanation: &Explanation) -> Vec<Panel> {
    let report = &explanation.report;
    let lost = report.lost_mass.map_or_else(String::new, |lost| format!(" of {:.1} %", percent(f64::from(lost))));
    let needs = format!(
        "A cell holds one row for every head, so all heads hold the same number, {}. The dots say how many each would need by \
         itself to give up no more than the mean{lost}: where they lie above the line, the head gives up more than the mean.",
        page::count(report.cells_after)
    );
    let given_up = "What each head really gives up with the cells it holds.".to_owned();
    let agreement = overlap(explanation).map_or_else(String::new, |(overlap, chance)| {
        format!(
            "Each kind of query is asked for as many tokens as were kept, beside the first and last ones that always stay. \
             The two choices share {overlap:.0} % on average; two blind choices would share {chance:.0} %."
        )
    });
    let panels = [
        plot::needs(explanation, needs),
        plot::lost_by_layer(explanation, given_up),
        plot::agreement(explanation, agreement),
    ];
    panels.into_iter().flatten().collect()
}

/// Returns the share of tokens that real and synthetic queries both choose, and the share expected for two random choices, in percent.
fn overlap(explanation: &Explanation) -> Option<(f64, f64)> {
    let all = explanation.heads.iter().map(|head| head.agreement).collect::<Option<Vec<_>>>()?;
    let kept: u32 = all.iter().map(|a| a.both + a.real + a.synthetic + a.neither).sum();
    let common: u32 = all.iter().map(|a| a.common).sum();
    let forced = explanation.policy.sinks + explanation.policy.recent;
    let free = explanation.report.cells_before.saturating_sub(forced) * all.len();
    (kept > 0 && free > 0)
        .then(|| (percent(f64::from(common) / f64::from(kept)), percent(f64::from(kept) / free as f64)))
}

fn steps(explanation: &Explanation, prefill: Duration) -> Vec<Step> {
    let report = &explanation.report;
    let steps = [
        ("reading the prompt", prefill),
        ("reading again", report.replay_time),
        ("synthetic queries", report.probe_time),
        ("scoring the keys", report.score_time),
        ("ranking", report.select_time),
        ("trial", report.trial_time),
        ("setting aside", report.aside_time),
        ("compaction", report.compact_time),
    ];
    let all: f64 = steps.iter().map(|(_, time)| time.as_secs_f64()).sum();
    let steps = steps.into_iter().filter(|(_, time)| time.as_millis() > 0).map(|(name, time)| Step {
        name,
        seconds: time.as_secs_f64(),
        percent: percent(time.as_secs_f64() / all),
    });
    steps.collect()
}

fn percent(share: f64) -> f64 {
    100.0 * share
}

fn rounded(values: &[f64]) -> Vec<f64> {
    values.iter().map(|value| significant(*value).parse().unwrap_or_default()).collect()
}

/// Rounds to [`DIGITS`] significant digits.
fn significant(value: f64) -> String {
    let short: f64 = format!("{value:.*e}", DIGITS - 1).parse().unwrap_or(value);
    short.to_string()
}
