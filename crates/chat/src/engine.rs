//! The Jinja environment of chat templates, set up like that of transformers.

use std::env;

use jiff::fmt::strtime::{BrokenDownTime, Config};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ZonedDateTime};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::methods::{self, MODULO};
use super::{json, source};

/// Limit on rendering: instructions, plus one unit for every 64 bytes of text. A template from a file runs for at most
/// some seconds and takes at most 2 GiB.
const FUEL: u64 = 32_000_000;

/// The environment variable that sets the clock, in seconds since 1970 (see reproducible-builds.org).
const CLOCK: &str = "SOURCE_DATE_EPOCH";

/// Renders `source`. `now`: time for the template's date, in seconds since 1970; None: the time of [`clock`].
pub(super) fn render(source: &str, now: Option<i64>, values: Value) -> Result<String, Error> {
    let mut env = Environment::new();
    env.set_fuel(Some(FUEL));
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("whitespace options alone are always valid"));
    env.set_unknown_method_callback(methods::call);
    env.add_filter("tojson", json::tojson);
    // In Python, None is not iterable, and strings are sequences.
    env.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    env.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)
    });
    env.add_function(MODULO, |state: &State, left: &Value, right: &Value| methods::modulo(state, left, right));
    env.add_function("raise_exception", |text: &Value| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text.to_string()))
    });
    env.add_function("strftime_now", move |format: &str| date(format, now));
    env.render_str(&source::adapt(source), values)
}

/// Returns the seconds since 1970 from `SOURCE_DATE_EPOCH`, or from the system clock if the variable is not set.
///
/// # Errors
/// Returns a message if `SOURCE_DATE_EPOCH` is invalid.
pub(super) fn clock() -> Result<i64, String> {
    let Some(given) = env::var_os(CLOCK) else { return Ok(Timestamp::now().as_second()) };
    let seconds = given.to_str().and_then(|text| text.parse().ok());
    let is_time = |&seconds: &i64| Timestamp::from_second(seconds).is_ok();
    seconds.filter(is_time).ok_or_else(|| format!("{CLOCK}={} is no number of seconds since 1970", given.display()))
}

/// Formats the date in local time, or in UTC if `SOURCE_DATE_EPOCH` is set. Directives unknown to strftime stay as they
/// are.
fn date(format: &str, now: Option<i64>) -> Result<String, Error> {
    let invalid = |what: String| Error::new(ErrorKind::InvalidOperation, what);
    let now = now.map_or_else(clock, Ok).map_err(invalid)?;
    let zone = if env::var_os(CLOCK).is_some() { TimeZone::UTC } else { TimeZone::system() };
    let now = ZonedDateTime::new(Timestamp::from_second(now).map_err(|e| invalid(e.to_string()))?, zone);
    let config = Config::new().lenient(true);
    BrokenDownTime::from(&now).to_string_with_config(&config, format).map_err(|e| invalid(e.to_string()))
}
