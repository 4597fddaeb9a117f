//! Jinja as transformers sets it up for chat templates.

use std::env;

use jiff::fmt::strtime::{BrokenDownTime, Config};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ZonedDateTime};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::methods::{self, MODULO};
use super::{json, source};

/// What rendering may cost: instructions, and 64 bytes of text each. No file's template runs for longer than some seconds, or
/// takes more than 2 GiB.
const FUEL: u64 = 32_000_000;

/// The variable that sets the clock, in seconds since 1970 (see reproducible-builds.org).
const CLOCK: &str = "SOURCE_DATE_EPOCH";

/// Renders `source`. `now`: seconds since 1970 that a template's date is of; None: what [`clock`] says.
pub(super) fn render(source: &str, now: Option<i64>, values: Value) -> Result<String, Error> {
    let mut env = Environment::new();
    env.set_fuel(Some(FUEL));
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("whitespace options alone are always valid"));
    env.set_unknown_method_callback(methods::call);
    env.add_filter("tojson", json::tojson);
    // Python's None is nothing to iterate over, and its strings are sequences
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

/// Seconds since 1970: what `SOURCE_DATE_EPOCH` says, or else the system.
///
/// # Errors
/// What is wrong with `SOURCE_DATE_EPOCH`.
pub(super) fn clock() -> Result<i64, String> {
    let Some(given) = env::var_os(CLOCK) else { return Ok(Timestamp::now().as_second()) };
    let seconds = given.to_str().and_then(|text| text.parse().ok());
    let is_time = |&seconds: &i64| Timestamp::from_second(seconds).is_ok();
    seconds.filter(is_time).ok_or_else(|| format!("{CLOCK}={} is no number of seconds since 1970", given.display()))
}

/// The date, in local time; in UTC where `SOURCE_DATE_EPOCH` sets the clock. What a format has and strftime does not know stays.
fn date(format: &str, now: Option<i64>) -> Result<String, Error> {
    let invalid = |what: String| Error::new(ErrorKind::InvalidOperation, what);
    let now = now.map_or_else(clock, Ok).map_err(invalid)?;
    let zone = if env::var_os(CLOCK).is_some() { TimeZone::UTC } else { TimeZone::system() };
    let now = ZonedDateTime::new(Timestamp::from_second(now).map_err(|e| invalid(e.to_string()))?, zone);
    let config = Config::new().lenient(true);
    BrokenDownTime::from(&now).to_string_with_config(&config, format).map_err(|e| invalid(e.to_string()))
}
