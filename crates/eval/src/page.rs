//! Self-contained HTML pages: one file without external resources, for light and dark mode, desktops and phones.

use minijinja::{Environment, Value};

/// The extension `.html` enables escaping.
const NAME: &str = "page.html";

/// Renders a page. The template may include `style.css`, which all pages share, and `parts`, given as names and texts.
///
/// # Panics
/// If a template is malformed; templates are constants.
pub fn render(template: &'static str, parts: &[(&'static str, &'static str)], context: Value) -> String {
    let mut env = Environment::new();
    for (name, text) in parts.iter().chain(&[("style.css", include_str!("page/style.css")), (NAME, template)]) {
        env.add_template(name, text).expect("the template is well-formed");
    }
    env.add_filter("count", count);
    let page = env.get_template(NAME).and_then(|page| page.render(context));
    page.expect("the page renders whatever the data are")
}

/// Formats a number with thousands separators: 4312 -> 4,312
pub fn count(n: usize) -> String {
    let digits = n.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
    groups.collect::<Vec<_>>().join(",")
}
