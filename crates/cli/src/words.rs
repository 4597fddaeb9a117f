//! Numbers in readable form, and lines on stderr.

use std::io::Write;

use anstyle::{Effects, Style};

use super::spelling::with_flags;

/// Prints a labelled line on stderr. Ignores errors, such as a closed stderr.
pub fn line(label: &str, text: &str) {
    let dim = Style::new().effects(Effects::DIMMED);
    let _ = writeln!(anstream::stderr(), "{dim}{label:<9}{dim:#} {}", with_flags(text));
}

/// Prints a remark on stderr.
pub fn note(text: &str) {
    let dim = Style::new().effects(Effects::DIMMED);
    let _ = writeln!(anstream::stderr(), "{dim}{}{dim:#}", with_flags(text));
}

/// Formats a rate with about three digits.
pub fn short(rate: f64) -> String {
    if rate < 100.0 { format!("{rate:.1}") } else { count(rate.round() as usize) }
}

/// Formats 4312 as 4,312.
pub fn count(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Formats a number with its noun: 1 vote, 2 votes.
pub fn plural(n: usize, what: &str) -> String {
    format!("{} {what}{}", count(n), if n == 1 { "" } else { "s" })
}

fn unit_for(n: usize) -> (f64, &'static str) {
    match n {
        0x4000_0000.. => (f64::from(1 << 30), "GiB"),
        0x10_0000.. => (f64::from(1 << 20), "MiB"),
        _ => (1024.0, "KiB"),
    }
}

/// Formats `n` bytes in the unit that suits `like`.
pub fn bytes(n: usize, like: usize) -> String {
    format!("{} {}", number_of_bytes(n, like), unit_for(like).1)
}

/// Formats `n` bytes in the unit that suits `like`, without the unit.
pub fn number_of_bytes(n: usize, like: usize) -> String {
    format!("{:.1}", n as f64 / unit_for(like).0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!([0, 999, 1000, 4312, 1_234_567].map(count), ["0", "999", "1,000", "4,312", "1,234,567"]);
    }

    #[test]
    fn bytes_share_a_unit() {
        assert_eq!(bytes(512, 512), "0.5 KiB");
        assert_eq!(bytes(1 << 20, 1 << 20), "1.0 MiB");
        assert_eq!(bytes(1 << 19, 1 << 20), "0.5 MiB");
        assert_eq!(bytes(3 << 30, 3 << 30), "3.0 GiB");
    }

    #[test]
    fn one_is_singular() {
        assert_eq!([0, 1, 2000].map(|n| plural(n, "vote")), ["0 votes", "1 vote", "2,000 votes"]);
    }
}
