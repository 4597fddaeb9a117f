//! Settings from the environment: `gvote with` sets it, and so can anybody.

use std::ffi::{CStr, CString, c_char};
use std::path::PathBuf;
use std::str::FromStr;

use super::ffi::gvote::*;

/// Mean KL of a trial to the full cache, in nats a token, as `gvote run --preset` has them.
const PRESETS: [(&str, f32); 3] = [("safe", 0.005), ("balanced", 0.02), ("aggressive", 0.1)];

/// What the environment asks for.
pub struct Settings {
    pub params: gvote_params,
    /// A file that gets a line of JSON for each vote.
    pub stats: Option<PathBuf>,
}

// SAFETY: the pointer in `params` is to a string that is never freed, and that nobody changes.
unsafe impl Send for Settings {}
// SAFETY: as above.
unsafe impl Sync for Settings {}

impl Settings {
    /// `defaults`: the library's.
    ///
    /// # Errors
    /// The variable that makes no sense, and why. Bounds are the library's to check.
    pub fn read(defaults: gvote_params, get: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let get = |name: &str| get(name).filter(|value| !value.is_empty());
        let mut params = defaults;
        if let Some(name) = get("GVOTE_PRESET") {
            let preset = PRESETS.iter().find(|preset| preset.0 == name);
            params.target_kl = preset.ok_or_else(|| wrong("GVOTE_PRESET", &name, "safe, balanced or aggressive"))?.1;
        }
        number(&get, "GVOTE_TARGET_KL", &mut params.target_kl)?;
        number(&get, "GVOTE_RATIO", &mut params.ratio)?;
        number(&get, "GVOTE_SINKS", &mut params.sinks)?;
        number(&get, "GVOTE_RECENT", &mut params.recent)?;
        number(&get, "GVOTE_WINDOW", &mut params.window)?;
        match get("GVOTE_VOTE").as_deref() {
            None | Some("auto") => {}
            Some("prompt") => (params.when, params.vote_after) = (GVOTE_WHEN_AFTER, 0),
            Some("never") => params.when = GVOTE_WHEN_NEVER,
            Some(text) => {
                params.when = GVOTE_WHEN_AFTER;
                let after = text.parse();
                params.vote_after = after.map_err(|_| wrong("GVOTE_VOTE", text, "auto, prompt, never or a number"))?;
            }
        }
        match get("GVOTE_RECALL").as_deref() {
            None | Some("auto" | "ram") => {}
            Some("off") => params.recall = GVOTE_RECALL_OFF,
            Some(path) => {
                let path = CString::new(path).map_err(|_| wrong("GVOTE_RECALL", path, "auto, ram, off or a file"))?;
                params.recall = GVOTE_RECALL_FILE;
                // read once, for as long as the process lives
                params.recall_file = path.into_raw();
            }
        }
        Ok(Self { params, stats: get("GVOTE_STATS").map(PathBuf::from) })
    }
}

fn wrong(name: &str, value: &str, use_: &str) -> String {
    format!("{name}={value}: use {use_}")
}

fn number<T: FromStr>(get: &dyn Fn(&str) -> Option<String>, name: &str, to: &mut T) -> Result<(), String> {
    if let Some(text) = get(name) {
        *to = text.parse().map_err(|_| wrong(name, &text, "a number"))?;
    }
    Ok(())
}

/// A C string that lives as long as the library says; "" for NULL.
pub fn text(of: *const c_char) -> String {
    if of.is_null() {
        return String::new();
    }
    // SAFETY: a string of libgvote or llama.cpp, which end with a zero.
    unsafe { CStr::from_ptr(of) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Settings, String> {
        let get = |name: &str| Some(variables.iter().find(|entry| entry.0 == name)?.1.to_owned());
        Settings::read(gvote_params { target_kl: 0.5, ..Default::default() }, get)
    }

    #[test]
    fn nothing_said_is_the_librarys_default() {
        let settings = read(&[("GVOTE_RATIO", "")]).unwrap();
        assert_eq!((settings.params.target_kl, settings.params.when), (0.5, GVOTE_WHEN_AUTO));
        assert!(settings.stats.is_none() && settings.params.recall_file.is_null());
    }

    #[test]
    fn each_variable_sets_its_own() {
        let params = |name, value| read(&[(name, value)]).unwrap().params;
        assert_eq!(params("GVOTE_PRESET", "safe").target_kl, 0.005);
        assert_eq!(params("GVOTE_TARGET_KL", "0.3").target_kl, 0.3);
        assert_eq!(params("GVOTE_RATIO", "0.25").ratio, 0.25);
        assert_eq!(params("GVOTE_SINKS", "7").sinks, 7);
        assert_eq!(params("GVOTE_RECENT", "40").recent, 40);
        assert_eq!(params("GVOTE_WINDOW", "9").window, 9);
        assert_eq!(params("GVOTE_RECALL", "off").recall, GVOTE_RECALL_OFF);
        assert_eq!(params("GVOTE_VOTE", "never").when, GVOTE_WHEN_NEVER);
        for (text, after) in [("prompt", 0), ("12", 12)] {
            let params = params("GVOTE_VOTE", text);
            assert_eq!((params.when, params.vote_after), (GVOTE_WHEN_AFTER, after));
        }
        let settings = read(&[("GVOTE_RECALL", "aside"), ("GVOTE_STATS", "votes.jsonl")]).unwrap();
        assert_eq!(settings.params.recall, GVOTE_RECALL_FILE);
        assert_eq!(text(settings.params.recall_file), "aside");
        assert_eq!(settings.stats.unwrap().to_str(), Some("votes.jsonl"));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (name, value) in
            [("GVOTE_PRESET", "wild"), ("GVOTE_RATIO", "half"), ("GVOTE_VOTE", "soon"), ("GVOTE_SINKS", "-1")]
        {
            let error = read(&[(name, value)]).err().unwrap();
            assert!(error.starts_with(&format!("{name}={value}: use ")), "{error}");
        }
    }
}
