//! Metrics: the distance between next-token distributions, and the quality of an answer.

use gvote::policy::divergence::Divergence;

/// Distance of the next-token distributions from those of the full cache, collected step by step.
///
/// A mean or quantile over no steps is NaN.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Distance {
    /// Number of steps added.
    pub steps: usize,
    /// KL(full || got) of each step, in nats.
    pub kl: Vec<f64>,
    /// ln p_full(next) - ln p_got(next) of each step, in nats.
    pub log_ratio: Vec<f64>,
    /// Number of steps in which both have the same most likely token.
    pub same_top: usize,
}

impl Distance {
    /// Adds a step: the logits of the full cache, those of the cache in question, and the next token of the text.
    ///
    /// # Panics
    /// If the two slices have different lengths, or `next` is out of range.
    pub fn add(&mut self, full: &[f32], got: &[f32], next: usize) {
        let Divergence { kl, log_ratio, same_top } = Divergence::between(full, got, next);
        self.steps += 1;
        self.kl.push(kl);
        self.log_ratio.push(log_ratio);
        self.same_top += usize::from(same_top);
    }

    /// Mean KL, in nats.
    pub fn mean_kl(&self) -> f64 {
        mean(&self.kl)
    }

    /// Median KL, in nats; for an even number of steps, the mean of the two middle values.
    pub fn median_kl(&self) -> f64 {
        quantile(&self.kl, 0.5)
    }

    /// 90th percentile of the KL, in nats, interpolated like [`quantile`].
    pub fn p90_kl(&self) -> f64 {
        quantile(&self.kl, 0.9)
    }

    /// Mean of ln p_full(next) - ln p_got(next): the logarithm of the perplexity ratio. Above 0, `got` is worse.
    pub fn log_perplexity_ratio(&self) -> f64 {
        mean(&self.log_ratio)
    }

    /// Share of the steps with the same most likely token, 0 to 1.
    pub fn same_top(&self) -> f64 {
        self.same_top as f64 / self.steps as f64
    }
}

/// Returns the mean; NaN for no values.
pub fn mean(x: &[f64]) -> f64 {
    // Not `sum`, which starts at -0.
    x.iter().fold(0.0, |sum, x| sum + x) / x.len() as f64
}

/// Returns the value at position `q * (n - 1)` of the sorted values, interpolated linearly between neighbours (type 7
/// of Hyndman and Fan 1996, the default of numpy and R). NaN for no values.
pub fn quantile(x: &[f64], q: f64) -> f64 {
    let mut sorted = x.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let place = q * sorted.len().saturating_sub(1) as f64;
    let part = place.fract();
    match sorted[(place as usize).min(sorted.len())..] {
        [] => f64::NAN,
        // At a whole position or between equal values no interpolation is needed; between infinite ones it would give
        // NaN.
        [below, ..] if part == 0.0 => below,
        [below, above, ..] if below != above => below + part * (above - below),
        [below, ..] => below,
    }
}

/// Returns the share of the references that occur in the answer, ignoring case, 0 to 1: RULER's `string_match_all`. 0
/// without references.
pub fn share_found(answer: &str, references: &[String]) -> f64 {
    let answer = answer.to_lowercase();
    let found = references.iter().filter(|reference| answer.contains(&reference.to_lowercase())).count();
    found as f64 / references.len().max(1) as f64
}

/// Returns true if the final number of an answer equals that of the reference, as GSM8K requires.
///
/// The final number is the last number on the first line with a number after `####`, so that text invented after the
/// answer is ignored; without that mark it is the last number of the text. Commas, `$` and trailing dots are not part
/// of a number, and 18.0 equals 18. The reference is parsed in the same way. Without a number there is no match.
pub fn exact_number(answer: &str, reference: &str) -> bool {
    let number = final_number(answer);
    number.is_some() && number == final_number(reference)
}

/// The mark before the result in GSM8K.
const RESULT: &str = "####";

fn final_number(text: &str) -> Option<Decimal> {
    let marked = text.split_once(RESULT).and_then(|(_, result)| result.lines().find_map(last_number));
    marked.or_else(|| last_number(text))
}

/// A decimal number without insignificant zeros: equal numbers compare equal, at any length.
#[derive(Debug, PartialEq)]
struct Decimal {
    negative: bool,
    /// Without leading zeros.
    whole: String,
    /// Digits after the point, without trailing zeros.
    fraction: String,
}

/// Returns the last decimal number of a text, such as `-1,234.50`, `$18` or `-$.5`.
fn last_number(text: &str) -> Option<Decimal> {
    let text = text.as_bytes();
    let is_digit = |at: usize| text.get(at).is_some_and(u8::is_ascii_digit);
    let is = |at: usize, what: u8| text.get(at) == Some(&what);
    let mut last = None;
    let mut at = 0;
    while at < text.len() {
        if !(is_digit(at) || is(at, b'.') && is_digit(at + 1)) {
            at += 1;
            continue;
        }
        let negative = has_minus(&text[..at]);
        let (mut whole, mut fraction) = (String::new(), String::new());
        // A comma or a point belongs to the number if a digit follows.
        while is_digit(at) || is(at, b',') && is_digit(at + 1) {
            if is_digit(at) {
                whole.push(char::from(text[at]));
            }
            at += 1;
        }
        if is(at, b'.') && is_digit(at + 1) {
            at += 1;
            while is_digit(at) {
                fraction.push(char::from(text[at]));
                at += 1;
            }
        }
        let whole = whole.trim_start_matches('0').to_owned();
        let fraction = fraction.trim_end_matches('0').to_owned();
        let is_zero = whole.is_empty() && fraction.is_empty();
        last = Some(Decimal { negative: negative && !is_zero, whole, fraction });
    }
    last
}

/// Returns true if a text ends in the sign of a negative number. A minus right after a word or a number is a hyphen or
/// a difference, as in `16-3`.
fn has_minus(before: &[u8]) -> bool {
    match before {
        [rest @ .., b'-', b'$'] | [rest @ .., b'$', b'-'] | [rest @ .., b'-'] => {
            !rest.last().is_some_and(|b| b.is_ascii_alphanumeric() || *b == b')')
        }
        _ => false,
    }
}

/// ROUGE-L of an answer, 0 to 1: the best over the references.
///
/// The F-measure with beta = 1 of Lin 2004 (equations 2 to 4): with L the length of the longest common subsequence of
/// words, P = L / words of the answer, R = L / words of the reference, F = 2PR / (P + R) = 2L / (words of both). Words
/// are runs of a-z and 0-9 in lower case, without stemming.
pub fn rouge_l(answer: &str, references: &[String]) -> f64 {
    let answer = answer.to_lowercase();
    let answer: Vec<&str> = words(&answer).collect();
    references
        .iter()
        .map(|reference| {
            let reference = reference.to_lowercase();
            let reference: Vec<&str> = words(&reference).collect();
            let both = answer.len() + reference.len();
            2.0 * common_subsequence(&reference, &answer) as f64 / both.max(1) as f64
        })
        .fold(0.0, f64::max)
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit())).filter(|word| !word.is_empty())
}

/// Length of the longest common subsequence, in time |a| |b| and memory |b|.
fn common_subsequence(a: &[&str], b: &[&str]) -> usize {
    // length[j]: for the part of `a` processed so far and b[..j].
    let mut length = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = length[j + 1];
            length[j + 1] = if x == y { diagonal + 1 } else { above.max(length[j]) };
            diagonal = above;
        }
    }
    length[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(full: &[f32], got: &[f32], next: usize) -> Distance {
        let mut distance = Distance::default();
        distance.add(full, got, next);
        distance
    }

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-12
    }

    fn of_kl(kl: &[f64]) -> Distance {
        Distance { steps: kl.len(), kl: kl.to_vec(), ..Distance::default() }
    }

    fn texts(of: &[&str]) -> Vec<String> {
        of.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn equal_logits_are_no_distance_at_all() {
        let logits: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.7).sin() * 9.0).collect();
        let distance = step(&logits, &logits, 17);
        assert_eq!((distance.mean_kl(), distance.log_perplexity_ratio(), distance.same_top()), (0.0, 0.0, 1.0));
    }

    #[test]
    fn two_tokens_by_hand() {
        // e^(ln 3) = 3, so p = (3/4, 1/4) and q = (1/2, 1/2).
        let ln_3 = 3_f32.ln();
        let p = f64::from(ln_3).exp() / (f64::from(ln_3).exp() + 1.0);
        let kl = p * (2.0 * p).ln() + (1.0 - p) * (2.0 * (1.0 - p)).ln();
        assert!((kl - 0.130_812).abs() < 1e-6, "3/4 ln(3/2) + 1/4 ln(1/2)");
        let distance = step(&[ln_3, 0.0], &[0.0, 0.0], 1);
        assert!(near(distance.mean_kl(), kl), "{distance:?}");
        assert!(near(distance.log_perplexity_ratio(), (2.0 * (1.0 - p)).ln()), "{distance:?}");
        let back = step(&[0.0, 0.0], &[ln_3, 0.0], 0);
        assert!(near(back.mean_kl(), -0.5 * (4.0 * p * (1.0 - p)).ln()), "KL is not symmetric: {back:?}");
    }

    #[test]
    fn a_shift_of_the_logits_changes_nothing() {
        let (full, got) = ([1.5_f32, -2.0, 0.25, 4.0], [1.0_f32, -1.0, 0.5, 3.0]);
        let plain = step(&full, &got, 2);
        let shifted = step(&full.map(|x| x + 256.0), &got.map(|x| x - 1024.0), 2);
        assert!(plain.mean_kl() > 0.01);
        assert!(near(plain.mean_kl(), shifted.mean_kl()) && near(plain.log_ratio[0], shifted.log_ratio[0]));
    }

    #[test]
    fn huge_and_impossible_logits_stay_finite() {
        let distance = step(&[1e30, -1e30, 0.0], &[1e30, 0.0, -1e30], 0);
        assert_eq!((distance.mean_kl(), distance.log_perplexity_ratio()), (0.0, 0.0));
        let distance = step(&[f32::MAX, f32::MIN], &[f32::MIN, f32::MAX], 1);
        assert!(distance.mean_kl().is_finite() && distance.log_perplexity_ratio().is_finite());
        let none = f32::NEG_INFINITY;
        assert_eq!(step(&[0.0, none], &[0.0, none], 0).mean_kl(), 0.0);
        assert!(near(step(&[0.0, none], &[0.0, 0.0], 0).mean_kl(), 2_f64.ln()));
        assert_eq!(step(&[0.0, 0.0], &[0.0, none], 0).mean_kl(), f64::INFINITY, "what was likely became impossible");
        assert!(step(&[f32::NAN, 0.0], &[0.0, 0.0], 0).mean_kl().is_nan(), "a broken model is not hidden");
    }

    #[test]
    fn steps_add_up() {
        let mut distance = Distance::default();
        assert!(distance.mean_kl().is_nan() && distance.median_kl().is_nan() && distance.same_top().is_nan());
        distance.add(&[1.0, 0.0], &[2.0, 0.0], 0);
        distance.add(&[1.0, 0.0], &[0.0, 1.0], 0);
        assert_eq!((distance.steps, distance.same_top()), (2, 0.5));
        assert!(near(distance.mean_kl(), (distance.kl[0] + distance.kl[1]) / 2.0));
        assert!(distance.log_ratio[0] < 0.0, "surer of the right token than the full cache");
        assert!(near(distance.log_ratio[1], 1.0), "e / (e + 1) against 1 / (e + 1)");
    }

    #[test]
    fn quantiles_lie_on_a_line_between_neighbours() {
        let ten = of_kl(&[9.0, 0.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0]);
        assert_eq!((ten.median_kl(), ten.mean_kl()), (4.5, 4.5));
        assert!(near(ten.p90_kl(), 8.1), "place 0.9 * 9 = 8.1");
        assert_eq!((of_kl(&[3.0]).median_kl(), of_kl(&[3.0]).p90_kl()), (3.0, 3.0));
        let endless = of_kl(&[1.0, f64::INFINITY, f64::INFINITY]);
        assert_eq!((endless.median_kl(), endless.p90_kl()), (f64::INFINITY, f64::INFINITY));
    }

    #[test]
    fn share_found_ignores_case_and_counts_references() {
        let wanted = texts(&["4194548", "PZAPI"]);
        assert_eq!(share_found("They are pzapi, and 4194548.", &wanted), 1.0);
        assert_eq!(share_found("4194548", &wanted), 0.5);
        assert_eq!(share_found("", &wanted), 0.0);
        assert_eq!(share_found("anything", &[]), 0.0);
    }

    #[test]
    fn the_last_number_is_the_answer() {
        for (answer, reference) in [
            ("She makes 9 * 2 = $18 a day.\n#### 18", "18"),
            ("#### 18", "#### 18"),
            ("so it is $1,234.50.", "1234.5"),
            ("The answer is **$2,125**.", "2,125"),
            ("18.00", "18"),
            ("007", "7"),
            ("it falls to -5 degrees", "-5"),
            ("a loss of -$40", "-40"),
            ("a loss of $-40", "-40"),
            ("16-3", "3"),
            ("(10)-3", "3"),
            ("-0.0", "0"),
            ("half of it: .5", "0.50"),
            ("3, 4", "4"),
            ("#### 18\n\nQuestion: 3 apples?\nAnswer: 3\n#### 3", "18"),
            ("####\n18", "18"),
            ("it is 18 ####", "18"),
            ("#### 9 * 2 = 18", "18"),
            ("100000000000000000001", "100000000000000000001"),
        ] {
            assert!(exact_number(answer, reference), "{answer:?} is {reference}");
        }
        for (answer, reference) in [
            ("eighteen", "18"),
            ("", "18"),
            ("no", "none"),
            ("5", "-5"),
            ("18.5", "18"),
            ("180", "18"),
            ("18 or 19", "18"),
            ("#### 19\nor is it\n#### 18", "18"),
            ("100000000000000000000", "100000000000000000001"),
        ] {
            assert!(!exact_number(answer, reference), "{answer:?} is not {reference}");
        }
    }

    #[test]
    fn rouge_l_by_hand() {
        // The example of Lin 2004: "police the gunman" is common to both, then only "the gunman".
        let reference = texts(&["Police killed the gunman."]);
        assert!(near(rouge_l("police kill the gunman", &reference), 0.75));
        assert!(near(rouge_l("the gunman kill police", &reference), 0.5));
        // P = 2/3, R = 2/6: F = 2 (2/3)(1/3) / (2/3 + 1/3) = 4/9.
        assert!(near(rouge_l("a-b, x", &texts(&["A c B d e f"])), 4.0 / 9.0));
        assert_eq!(rouge_l("A b c", &texts(&["nothing in it", "a B c!"])), 1.0, "the best reference counts");
        assert_eq!(rouge_l("", &texts(&["", "a"])), 0.0);
    }

    #[test]
    fn the_common_subsequence_needs_order_but_no_neighbours() {
        let lcs = |a: &str, b: &str| {
            common_subsequence(&a.split("").collect::<Vec<_>>(), &b.split("").collect::<Vec<_>>()) - 2
        };
        assert_eq!(lcs("abcbdab", "bdcaba"), 4);
        assert_eq!(lcs("abc", "cba"), 1);
        assert_eq!(lcs("aaaa", "aa"), 2);
    }
}
