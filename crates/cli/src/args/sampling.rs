//! Flags for choosing the next token.

use std::ffi::CString;
use std::path::PathBuf;

use anyhow::{Context as _, Result, anyhow};
use clap::Args;
use gvote::llama::{Dry, LlamaError, Mirostat, Model, SamplerKind, SamplerParams, Token, is_repeat_penalty};

use super::{finite, number, share};
use crate::Exit;
use crate::prompt::{read_text, unescape};

/// Sampling flags. A setting without a default here takes the model file's recommendation, or else llama.cpp's default.
#[derive(Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Random seed; -1 = a new one each time
    #[arg(short, long, value_name = "N", default_value_t = -1, value_parser = seed)]
    seed: i64,

    /// Temperature; 0 or less = always the most likely token [default: the model's, or 0.8]
    #[arg(long, visible_alias = "temperature", value_name = "T", value_parser = finite)]
    temp: Option<f32>,

    /// Top-k: sample from the K most likely tokens; 0 = all [default: the model's, or 40]
    #[arg(long, value_name = "K")]
    top_k: Option<i32>,

    /// Top-p: sample from the most likely tokens whose probabilities add up to P; 1 = all [default: the model's, or 0.95]
    #[arg(long, value_name = "P", value_parser = share)]
    top_p: Option<f32>,

    /// Min-p: drop tokens less likely than P times the most likely one; 0 = drop none [default: the model's, or 0.05]
    #[arg(long, value_name = "P", value_parser = share)]
    min_p: Option<f32>,

    /// Locally typical sampling: sample from the tokens closest to the expected information, up to a total probability of P; 1 = all
    #[arg(long, visible_alias = "typical-p", value_name = "P", default_value_t = SamplerParams::default().typical_p, value_parser = share)]
    typical: f32,

    /// Drop tokens whose logits are more than N standard deviations below the highest; 0 or less = drop none
    #[arg(long, visible_alias = "top-nsigma", value_name = "N", default_value_t = SamplerParams::default().top_n_sigma, value_parser = finite)]
    top_n_sigma: f32,

    /// XTC: with this probability, drop all tokens at or above --xtc-threshold except the least likely of them; 0 = never [default: the
    /// model's, or 0]
    #[arg(long, value_name = "P", value_parser = share)]
    xtc_probability: Option<f32>,

    /// XTC: lowest probability at which a token may be dropped; above 0.5 = drop none [default: the model's, or 0.1]
    #[arg(long, value_name = "P", value_parser = share)]
    xtc_threshold: Option<f32>,

    /// Dynamic temperature: vary --temp by up to this much in both directions, depending on the entropy; 0 = off
    #[arg(long, value_name = "T", default_value_t = SamplerParams::default().dynatemp_range, value_parser = not_negative)]
    dynatemp_range: f32,

    /// Dynamic temperature: exponent that maps entropy to temperature
    #[arg(long, value_name = "X", default_value_t = SamplerParams::default().dynatemp_exponent, value_parser = not_negative)]
    dynatemp_exp: f32,

    /// Use Mirostat 1 or 2 instead of --samplers, at --temp; 0 = off [default: the model's, or 0]
    #[arg(long, value_name = "0|1|2", value_parser = mirostat)]
    mirostat: Option<Mirostat>,

    /// Mirostat: learning rate eta [default: the model's, or 0.1]
    #[arg(long, value_name = "X", value_parser = not_negative)]
    mirostat_lr: Option<f32>,

    /// Mirostat: target entropy tau, in bits [default: the model's, or 5]
    #[arg(long, value_name = "BITS", value_parser = not_negative)]
    mirostat_ent: Option<f32>,

    /// Adaptive-p: prefer tokens near this probability; less than 0 = off. Needs adaptive_p in --samplers
    #[arg(long, value_name = "P", default_value_t = SamplerParams::default().adaptive_target, value_parser = at_most_1)]
    adaptive_target: f32,

    /// Adaptive-p: how slowly the target adapts to the chosen tokens, from 0 to 0.99
    #[arg(long, value_name = "SHARE", default_value_t = SamplerParams::default().adaptive_decay, value_parser = decay)]
    adaptive_decay: f32,

    /// Samplers and their order: penalties, dry, top_n_sigma, top_k, typ_p, top_p, min_p, xtc, temperature and adaptive_p [default: the
    /// model's, or all but the last, in this order]
    #[arg(long, value_name = "NAME;...", value_parser = Chain::from_names, conflicts_with = "sampler_seq")]
    samplers: Option<Chain>,

    /// The same, one letter per sampler: edskypmxt is the default, a is adaptive_p
    #[arg(long, visible_alias = "sampling-seq", value_name = "LETTERS", value_parser = Chain::from_letters)]
    sampler_seq: Option<Chain>,

    /// Make a token more or less likely: 15043+1, 15043-2.5, or 15043-inf to ban it. Can be repeated
    #[arg(short, long, value_name = "TOKEN_ID(+/-)BIAS", value_parser = logit_bias)]
    logit_bias: Vec<(Token, f32)>,

    /// Continue where the model would end its answer
    #[arg(long)]
    ignore_eos: bool,

    /// Penalty factor for tokens that occur among the last ones, prompt included; 1 = off [default: the model's, or 1]
    #[arg(long, value_name = "X", value_parser = repeat_penalty, help_heading = "Repetition")]
    repeat_penalty: Option<f32>,

    /// Number of last tokens the penalties look at; 0 = none, -1 = the whole context [default: the model's, or 64]
    #[arg(long, value_name = "N", value_parser = last_n(), help_heading = "Repetition")]
    repeat_last_n: Option<i32>,

    /// Presence penalty: subtract this from the logits of tokens that occur among the last ones; 0 = off
    #[arg(long, value_name = "X", default_value_t = SamplerParams::default().presence_penalty, value_parser = finite,
          help_heading = "Repetition")]
    presence_penalty: f32,

    /// Frequency penalty: subtract this for each occurrence among the last tokens; 0 = off
    #[arg(long, value_name = "X", default_value_t = SamplerParams::default().frequency_penalty, value_parser = finite,
          help_heading = "Repetition")]
    frequency_penalty: f32,

    /// DRY: penalty for a token that would continue a repetition of L tokens: MULTIPLIER * BASE ^ (L - ALLOWED_LENGTH); 0 = off
    #[arg(long, value_name = "X", default_value_t = Dry::default().multiplier, value_parser = finite,
          help_heading = "Repetition")]
    dry_multiplier: f32,

    /// DRY: base of the penalty, 1 or more
    #[arg(long, value_name = "X", default_value_t = Dry::default().base, value_parser = at_least_1,
          help_heading = "Repetition")]
    dry_base: f32,

    /// DRY: length up to which repetitions are not penalised
    #[arg(long, value_name = "N", default_value_t = Dry::default().allowed_length, help_heading = "Repetition",
          value_parser = clap::value_parser!(i32).range(0..))]
    dry_allowed_length: i32,

    /// DRY: number of last tokens searched for repetitions; 0 = none, -1 = the whole context
    #[arg(long, value_name = "N", default_value_t = Dry::default().penalty_last_n, value_parser = last_n(),
          help_heading = "Repetition")]
    dry_penalty_last_n: i32,

    /// DRY: text that ends a repetition. Can be repeated, and replaces the defaults: newline, colon, quotation mark and asterisk. Escapes
    /// such as \n are read as with -e; `none` = nothing ends repetitions
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Repetition")]
    dry_sequence_breaker: Vec<String>,

    /// Grammar that the answer must follow, in llama.cpp's GBNF: rules such as root ::= "yes" | "no"
    #[arg(
        long,
        value_name = "GBNF",
        allow_hyphen_values = true,
        conflicts_with = "grammar_file",
        help_heading = "Grammar"
    )]
    grammar: Option<String>,

    /// File with a GBNF grammar
    #[arg(long, value_name = "FILE", help_heading = "Grammar")]
    grammar_file: Option<PathBuf>,
}

/// Grammar from [`SamplingArgs::grammar`], and the flag that it came from.
pub struct Grammar {
    rules: CString,
    from: String,
    is_on_command_line: bool,
}

impl Grammar {
    fn error(&self, reason: &LlamaError) -> anyhow::Error {
        let error = format!("{}: {reason}", self.from);
        if self.is_on_command_line { Exit::Usage(error).into() } else { anyhow!(error) }
    }
}

impl SamplingArgs {
    /// Returns the grammar, if there is one; an empty text is none.
    pub fn grammar(&self) -> Result<Option<Grammar>> {
        let (text, from) = match (&self.grammar, &self.grammar_file) {
            (Some(text), _) => (text.clone(), "--grammar".to_owned()),
            (None, Some(path)) => (read_text(path, "--grammar-file")?, format!("{} (--grammar-file)", path.display())),
            (None, None) => return Ok(None),
        };
        if text.is_empty() {
            return Ok(None);
        }
        let rules = CString::new(text).with_context(|| format!("{from}: the grammar cannot be used"))?;
        Ok(Some(Grammar { rules, from, is_on_command_line: self.grammar.is_some() }))
    }

    /// Returns the sampler's parameters for this model. Without `--seed`, every call draws a new seed.
    ///
    /// # Errors
    /// [`Exit::Usage`] for a token or a grammar on the command line that the model cannot use.
    pub fn params(&self, model: &Model, grammar: Option<&Grammar>) -> Result<SamplerParams> {
        let own = SamplerParams::of(model);
        let chain = self.samplers.as_ref().or(self.sampler_seq.as_ref());
        let params = SamplerParams {
            seed: u32::try_from(self.seed).unwrap_or_else(|_| rand::random_range(0..SamplerParams::RANDOM)),
            samplers: chain.map_or(own.samplers, |chain| chain.0.clone()),
            temp: self.temp.unwrap_or(own.temp),
            dynatemp_range: self.dynatemp_range,
            dynatemp_exponent: self.dynatemp_exp,
            top_k: self.top_k.unwrap_or(own.top_k),
            top_p: self.top_p.unwrap_or(own.top_p),
            min_p: self.min_p.unwrap_or(own.min_p),
            typical_p: self.typical,
            top_n_sigma: self.top_n_sigma,
            xtc_probability: self.xtc_probability.unwrap_or(own.xtc_probability),
            xtc_threshold: self.xtc_threshold.unwrap_or(own.xtc_threshold),
            repeat_penalty: self.repeat_penalty.unwrap_or(own.repeat_penalty),
            repeat_last_n: self.repeat_last_n.unwrap_or(own.repeat_last_n),
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            dry: self.dry(),
            adaptive_target: self.adaptive_target,
            adaptive_decay: self.adaptive_decay,
            mirostat: self.mirostat.unwrap_or(own.mirostat),
            mirostat_tau: self.mirostat_ent.unwrap_or(own.mirostat_tau),
            mirostat_eta: self.mirostat_lr.unwrap_or(own.mirostat_eta),
            logit_bias: self.logit_bias.clone(),
            ignore_eos: self.ignore_eos,
            grammar: grammar.map(|grammar| grammar.rules.clone()),
        };
        params.check(model).map_err(|error| match (&error, grammar) {
            (LlamaError::Grammar(_), Some(grammar)) => grammar.error(&error),
            (LlamaError::NoSuchToken { .. }, _) => Exit::Usage(format!("--logit-bias: {error}")).into(),
            _ => error.into(),
        })?;
        Ok(params)
    }

    fn dry(&self) -> Dry {
        let own = Dry::default();
        // `none` drops the breakers before it, as in llama.cpp
        let given = &self.dry_sequence_breaker;
        let none = given.iter().rposition(|text| text == "none").map_or(0, |i| i + 1);
        Dry {
            multiplier: self.dry_multiplier,
            base: self.dry_base,
            allowed_length: self.dry_allowed_length,
            penalty_last_n: self.dry_penalty_last_n,
            sequence_breakers: match &given[..] {
                [] => own.sequence_breakers,
                given => given[none..].iter().map(|text| unescape(text)).collect(),
            },
        }
    }
}

#[derive(Clone)]
struct Chain(Vec<SamplerKind>);

impl Chain {
    fn from_names(text: &str) -> Result<Self, LlamaError> {
        let names = text.split(';').map(str::trim).filter(|name| !name.is_empty());
        names.map(str::parse).collect::<Result<_, _>>().map(Self)
    }

    fn from_letters(text: &str) -> Result<Self, String> {
        let kinds = text.chars().map(|letter| {
            SamplerKind::from_letter(letter).ok_or_else(|| {
                let letters = SamplerKind::ALL.iter().map(|kind| kind.letter());
                format!("no sampler has the letter {letter:?}: use some of {}", letters.collect::<String>())
            })
        });
        kinds.collect::<Result<_, _>>().map(Self)
    }
}

fn seed(text: &str) -> Result<i64, String> {
    match text.parse::<i64>() {
        Ok(n) if n == i64::from(SamplerParams::RANDOM) => {
            Err("this number stands for a random seed in llama.cpp: use -1 for one".into())
        }
        Ok(n) if (-1..i64::from(u32::MAX)).contains(&n) => Ok(n),
        _ => Err(format!("use a number from 0 to {}, or -1", u32::MAX - 1)),
    }
}

fn mirostat(text: &str) -> Result<Mirostat, String> {
    match text {
        "0" => Ok(Mirostat::Off),
        "1" => Ok(Mirostat::V1),
        "2" => Ok(Mirostat::V2),
        _ => Err("use 0, 1 or 2".into()),
    }
}

fn logit_bias(text: &str) -> Result<(Token, f32), String> {
    let sign = text.find(['+', '-']).filter(|&sign| sign > 0);
    let parsed = sign.and_then(|sign| Some((text[..sign].parse().ok()?, text[sign..].parse().ok()?)));
    let fits = |bias: f32| bias.is_finite() || bias == f32::NEG_INFINITY;
    parsed
        .filter(|&(_, bias)| fits(bias))
        .ok_or_else(|| "use the id of a token and a number with its sign, or -inf".into())
}

fn last_n() -> impl clap::builder::TypedValueParser<Value = i32> {
    clap::value_parser!(i32).range(-1..)
}

fn repeat_penalty(text: &str) -> Result<f32, String> {
    number(text, is_repeat_penalty, "a number above 0")
}

fn not_negative(text: &str) -> Result<f32, String> {
    number(text, |x| x >= 0.0, "a number from 0 up")
}

fn at_least_1(text: &str) -> Result<f32, String> {
    number(text, |x| x >= 1.0, "a number from 1 up")
}

fn at_most_1(text: &str) -> Result<f32, String> {
    number(text, |x| x <= 1.0, "a number up to 1")
}

fn decay(text: &str) -> Result<f32, String> {
    number(text, |x| (0.0..=0.99).contains(&x), "a number from 0 to 0.99")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_has_a_token_and_a_sign() {
        assert_eq!(logit_bias("15043+1").unwrap(), (15043, 1.0));
        assert_eq!(logit_bias("7-2.5").unwrap(), (7, -2.5));
        assert_eq!(logit_bias("0-inf").unwrap(), (0, f32::NEG_INFINITY));
        for text in ["", "7", "7 1", "-1", "+1", "a+1", "7+inf", "7-nan", "7+-1", "7+", "99999999999+1"] {
            assert!(logit_bias(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_number_that_means_random_is_no_seed() {
        assert!(seed("4294967295").unwrap_err().contains("-1"));
        assert_eq!(["-1", "0", "4294967294"].map(|n| seed(n).unwrap()), [-1, 0, 4_294_967_294]);
        for n in ["-2", "4294967296", "1.5", ""] {
            assert!(seed(n).is_err(), "{n}");
        }
    }

    #[test]
    fn chains_are_named_or_spelled() {
        assert_eq!(Chain::from_names("top-k;TEMP").unwrap().0, Chain::from_letters("kt").unwrap().0);
        assert!(Chain::from_names("").unwrap().0.is_empty());
        assert!(Chain::from_names("top_k;best").is_err_and(|e| e.to_string().contains("best")));
        assert!(Chain::from_letters("kz").is_err_and(|e| e.contains("'z'")));
    }
}
