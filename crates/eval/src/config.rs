//! A configuration of the compression, written as `NAME:KEY=VALUE,...`.

use std::num::NonZeroUsize;
use std::str::FromStr;

use serde_json::Value;

use gvote::policy::room;
use gvote::policy::{Kind, Params, PolicyError, Preset};
use gvote::session::Recall;

/// A named setting of a policy.
#[derive(Clone, Debug)]
pub struct Config {
    pub name: String,
    pub params: Params,
    /// Account for the rounding of a quantized K cache in the vote.
    pub account_error: bool,
    /// Read the prompt with only this many cells, as in [`gvote::Session::prefill_long`], before the policy's own vote.
    pub ctx_size: Option<usize>,
    /// How evicted rows are handled. `None`: as in the program, which drops them in `gvote run` and sets them aside in
    /// a chat of several turns, as `gvote chat` does.
    pub recall: Option<Recall>,
    /// While following an answer: choose the cells anew after every `renew` tokens, as in [`gvote::Session::renew`].
    pub renew: Option<usize>,
}

/// Why the text of a configuration is invalid.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{0:?}: KEY=VALUE expected, as in half:policy=snapkv,ratio=0.5")]
    Pair(String),
    #[error("{0:?} is no setting; choose one of {KEYS}")]
    Key(String),
    #[error("{0}={1}: {2}")]
    Value(String, String, String),
    #[error("ctx-size={0}, but the policy `full` frees no cells; choose another policy")]
    FullCtxSize(usize),
    #[error("ctx-size={n} is too few cells to go on in: {least} is the least with these sinks and recent")]
    CtxSize { n: usize, least: usize },
    #[error("renew chooses among what is set aside, and recall=off sets nothing aside; leave one of them out")]
    RenewOff,
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

const KEYS: &str = "policy, preset, target-kl, draft, lost-mass, ratio, max-cells, min-cells, p-nuc, samples, window, recent, sinks, span \
                    (back-forward), pool, head-mix, protect, replay, evict, exact, seed, key-error, \
                    ctx-size, recall, renew";

/// Fields of [`Params`] that determine how many cells are kept, but not which ones.
const BUDGET: &[&str] = &["target_kl", "draft", "lost_mass", "ratio", "max_cells", "min_cells"];

impl Config {
    /// Returns the settings without those of the budget. Configurations with the same ranking keep the same cells at
    /// the same count.
    pub fn ranking(&self) -> Params {
        let mut params = self.params.clone();
        if params.policy == Kind::AdaKv && !params.exact {
            // Its only difference from SnapKV is unequal budgets, and a cache has equal ones.
            params.policy = Kind::SnapKv;
        }
        let mut fields = serde_json::to_value(&params).expect("settings have string keys only");
        if let Some(fields) = fields.as_object_mut() {
            fields.retain(|name, _| !BUDGET.contains(&name.as_str()));
        }
        serde_json::from_value(fields).expect("a missing field has its default")
    }

    /// Returns a short name of the ranking: the policy and its differences from the defaults.
    pub fn ranking_name(&self) -> String {
        let [plain, fields] = [Params::default(), self.ranking()].map(|p| serde_json::to_value(p).unwrap_or_default());
        let mut parts = vec![self.ranking().policy.name().to_owned()];
        for (name, value) in fields.as_object().into_iter().flatten() {
            if name != "policy" && plain[name] != *value {
                parts.push(format!("{name}={value}"));
            }
        }
        if self.account_error {
            parts.push("key-error".into());
        }
        parts.join(",")
    }

    /// Returns all relevant settings as `KEY=VALUE,...`: the policy, its budget, and the differences from the policy's
    /// defaults. Without the seed, which the run sets.
    pub fn settings(&self) -> String {
        let [plain, fields] =
            [&Params::new(self.params.policy), &self.params].map(|p| serde_json::to_value(p).unwrap_or_default());
        let rules_budget = self.params.policy == Kind::Gvote && self.params.ratio.is_none();
        let rule = if self.params.tries() { "target_kl" } else { "lost_mass" };
        let mut parts = vec![format!("policy={}", self.params.policy.name())];
        for (name, value) in fields.as_object().into_iter().flatten() {
            let is_told = match name.as_str() {
                "target_kl" | "lost_mass" => rules_budget && name == rule,
                "policy" | "seed" => false,
                name => plain[name] != *value,
            };
            if is_told {
                let value = match value {
                    Value::Object(parts) => parts.values().map(Value::to_string).collect::<Vec<_>>().join("-"),
                    Value::String(text) => text.clone(),
                    value => value.to_string(),
                };
                parts.push(format!("{}={value}", name.replace('_', "-")));
            }
        }
        if self.account_error {
            parts.push("key-error=true".into());
        }
        parts.extend(self.ctx_size.map(|n| format!("ctx-size={n}")));
        parts.extend(self.recall.as_ref().map(|recall| match recall {
            Recall::Off => "recall=off".to_owned(),
            _ => "recall=auto".to_owned(),
        }));
        parts.extend(self.renew.map(|n| format!("renew={n}")));
        parts.join(",")
    }

    /// Returns the settings of a policy, or of a preset of the default policy.
    pub fn named(name: &str) -> Result<Self, PolicyError> {
        let params = match Preset::from_str(name) {
            Ok(preset) => Params::default().with_preset(preset),
            Err(_) => Params::new(Kind::from_str(name)?),
        };
        Ok(Self::of(name, params))
    }

    /// Returns the full cache, the reference of all comparisons.
    pub fn full() -> Self {
        Self::of(Kind::Full.name(), Params::new(Kind::Full))
    }

    fn of(name: &str, params: Params) -> Self {
        Self { name: name.into(), params, account_error: false, ctx_size: None, recall: None, renew: None }
    }

    pub fn is_full(&self) -> bool {
        self.params.policy == Kind::Full
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
        fn parse<T: FromStr<Err: std::fmt::Display>>(key: &str, value: &str) -> Result<T, ConfigError> {
            value.parse().map_err(|e: T::Err| ConfigError::Value(key.into(), value.into(), e.to_string()))
        }
        let p = &mut self.params;
        match key {
            "policy" => {}
            "preset" => *p = p.clone().with_preset(Preset::from_str(value)?),
            "target-kl" => p.target_kl = Some(parse(key, value)?),
            "draft" => p.draft = parse(key, value)?,
            "lost-mass" => (p.target_kl, p.lost_mass) = (None, parse(key, value)?),
            "ratio" => p.ratio = Some(parse(key, value)?),
            "max-cells" => p.max_cells = Some(parse(key, value)?),
            "min-cells" => p.min_cells = parse(key, value)?,
            "p-nuc" => p.p_nuc = parse(key, value)?,
            "samples" => p.samples = parse(key, value)?,
            "window" => p.window = parse(key, value)?,
            "recent" => p.recent = parse(key, value)?,
            "sinks" => p.sinks = parse(key, value)?,
            "span" => p.span = value.replace('-', ",").parse()?,
            "pool" => p.pool = parse(key, value)?,
            "head-mix" => p.head_mix = parse(key, value)?,
            "protect" => p.protect = parse(key, value)?,
            "replay" => p.replay = parse(key, value)?,
            "evict" => p.evict = value.parse()?,
            "exact" => p.exact = parse(key, value)?,
            "seed" => p.seed = parse(key, value)?,
            "key-error" => self.account_error = parse(key, value)?,
            "recall" => {
                self.recall = match value {
                    "auto" => Some(Recall::Auto),
                    "off" => Some(Recall::Off),
                    _ => return Err(ConfigError::Value(key.into(), value.into(), "choose auto or off".into())),
                }
            }
            "renew" => self.renew = Some(parse::<NonZeroUsize>(key, value)?.get()),
            "ctx-size" => self.ctx_size = Some(parse(key, value)?),
            _ => return Err(ConfigError::Key(key.into())),
        }
        Ok(())
    }
}

impl FromStr for Config {
    type Err = ConfigError;

    /// Parses `NAME` of a policy or preset, or `NAME:KEY=VALUE,...`.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let Some((name, rest)) = text.split_once(':') else {
            return Ok(Self::named(text)?);
        };
        let pair = |part: &'_ str| part.split_once('=').map(|(k, v)| (k.trim().to_owned(), v.trim().to_owned()));
        let parts = rest.split(',').filter(|part| !part.trim().is_empty());
        let pairs: Vec<(String, String)> =
            parts.map(|part| pair(part).ok_or_else(|| ConfigError::Pair(part.into()))).collect::<Result<_, _>>()?;
        // First, because the policy determines the defaults of the other settings.
        let kind = match pairs.iter().find(|(key, _)| key == "policy") {
            Some((_, value)) => Kind::from_str(value)?,
            None => Kind::Gvote,
        };
        let mut config = Self::of(name, Params::new(kind));
        for (key, value) in &pairs {
            config.set(key, value)?;
        }
        config.params.validate()?;
        let least = room::least_limit(room::least_cells(&config.params));
        match config.ctx_size {
            Some(n) if config.is_full() => Err(ConfigError::FullCtxSize(n)),
            Some(n) if n < least => Err(ConfigError::CtxSize { n, least }),
            _ if config.renew.is_some() && config.recall == Some(Recall::Off) => Err(ConfigError::RenewOff),
            _ => Ok(config),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gvote::policy::Span;

    #[test]
    fn a_configuration_starts_from_its_policy() {
        let config: Config = "half:ratio=0.5,policy=snapkv,span=2-32".parse().unwrap();
        assert_eq!(config.name, "half");
        let expected = Params { ratio: Some(0.5), span: Span { back: 2, forward: 32 }, ..Params::new(Kind::SnapKv) };
        assert_eq!(config.params, expected);
        assert_eq!("gvote-paper".parse::<Config>().unwrap().params, Params::new(Kind::GvotePaper));
        assert_eq!("safe".parse::<Config>().unwrap().params.lost_mass, Preset::Safe.lost_mass());
        assert!("full".parse::<Config>().unwrap().is_full());
    }

    #[test]
    fn a_ranking_knows_no_budget() {
        let ranking = |text: &str| text.parse::<Config>().unwrap().ranking();
        assert_eq!(ranking("safe"), Params::default());
        assert_eq!(
            ranking("a:ratio=0.3,head-mix=0.7"),
            ranking("b:lost-mass=0.2,max-cells=900,min-cells=70,head-mix=0.7")
        );
        assert_ne!(ranking("a:ratio=0.3,head-mix=0.7"), ranking("a:ratio=0.3"));
        assert_eq!(ranking("a:policy=gvote-paper,ratio=0.3"), Params::new(Kind::GvotePaper));
        assert_eq!(ranking("a:policy=adakv,ratio=0.3"), Params::new(Kind::SnapKv));
        assert_eq!(ranking("a:policy=adakv,exact=true"), Params { exact: true, ..Params::new(Kind::AdaKv) });
        let name = |text: &str| text.parse::<Config>().unwrap().ranking_name();
        assert_eq!([name("safe"), name("a:ratio=0.3,head-mix=0.5")], ["gvote", "gvote,head_mix=0.5"]);
        assert_eq!(name("a:policy=keydiff,key-error=true"), r#"keydiff,span={"back":0,"forward":0},key-error"#);
        let fields = serde_json::to_value(Params::default()).unwrap();
        assert!(BUDGET.iter().all(|name| fields.get(name).is_some()));
    }

    #[test]
    fn settings_tell_what_a_name_stands_for() {
        let settings = |text: &str| text.parse::<Config>().unwrap().settings();
        assert_eq!([settings("full"), settings("a:lost-mass=0.05")], ["policy=full", "policy=gvote,lost-mass=0.05"]);
        assert_eq!(settings("balanced"), "policy=gvote,target-kl=0.02");
        assert_eq!(settings("a:seed=7,ratio=0.3,head-mix=0.5"), "policy=gvote,head-mix=0.5,ratio=0.3");
        let given = "policy=snapkv,evict=cells,max-cells=900,span=2-32,key-error=true,ctx-size=2048";
        assert_eq!(settings(&format!("a:{given}")), given);
        assert_eq!(settings(&format!("a:{}", settings("safe"))), settings("safe"));
        for given in ["recall=auto", "recall=off", "recall=auto,renew=32"] {
            assert_eq!(settings(&format!("a:ratio=0.5,{given}")), format!("policy=gvote,ratio=0.5,{given}"));
        }
    }

    #[test]
    fn nonsense_is_named() {
        for (text, part) in [
            ("x:ratio", "KEY=VALUE"),
            ("x:colour=red", "colour"),
            ("x:ratio=half", "ratio=half"),
            ("x:ratio=2", "`ratio`"),
            ("x:policy=snapkv,exact=true", "adakv or gvote-paper"),
            ("x:policy=gvote-paper,exact=true,ratio=0.5", "`ratio`"),
            ("x:policy=adakv,evict=cells", "`evict`"),
            ("x:policy=full,ctx-size=2048", "ctx-size=2048"),
            ("x:ctx-size=90", "91 is the least"),
            ("x:ctx-size=0", "ctx-size=0"),
            ("x:recall=rows", "auto or off"),
            ("x:recall=off,renew=32", "recall=off"),
            ("x:max-cells=68", "`max_cells` to 69"),
            ("nobody", "nobody"),
        ] {
            let error = text.parse::<Config>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
