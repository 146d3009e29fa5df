//! How much `unsafe` there is, crate by crate.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::deployment::root;

/// Where the crates' sources lie; those of their tests and examples are told apart.
const CRATES: [(&str, &[&str]); 7] = [
    ("enlightenment", &["enlightenment/src"]),
    ("guest-probe", &["guest-probe/src"]),
    ("guest-probe-ebpf", &["guest-probe-ebpf/src"]),
    ("kernel-module", &["kernel-module/src", "kernel-module/kernel"]),
    ("dom0-migrator", &["dom0-migrator/src"]),
    ("xtask", &["xtask/src"]),
    (
        "tests and examples",
        &[
            "tests",
            "kernel-module/tests",
            "kernel-module/examples",
            "dom0-migrator/tests",
            "dom0-migrator/examples",
            "guest-probe/tests",
        ],
    ),
];

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    /// Blocks, functions, implementations and declarations that are unsafe.
    uses: usize,
    /// Lines of code, without comments and empty ones.
    lines: usize,
}

/// The counts, in one line.
///
/// # Errors
/// When sources cannot be read.
pub fn summary() -> Result<String> {
    let mut words = Vec::new();
    for (name, directories) in CRATES {
        let mut count = Count::default();
        for directory in directories {
            add(&root().join(directory), &mut count)?;
        }
        words.push(format!("{name} {} in {} lines", count.uses, count.lines));
    }
    Ok(format!("unsafe: {}", words.join(", ")))
}

fn add(path: &Path, count: &mut Count) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path).with_context(|| path.display().to_string())? {
            add(&entry?.path(), count)?;
        }
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let code = code_of(&text);
        count.uses += uses(&code);
        count.lines += code.lines().filter(|line| !line.trim().is_empty()).count();
    }
    Ok(())
}

/// The word, where it stands for itself.
fn uses(code: &str) -> usize {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    code.split(|c: char| !is_part(c)).filter(|word| *word == "unsafe").count()
}

/// A source without its comments and without what stands in quotes.
fn code_of(text: &str) -> String {
    let mut code = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if first == '"' {
            code.push_str("\"\"");
            end_of_text(rest)
        } else if let Some(hashes) = raw_text(rest, &code) {
            code.push_str("\"\"");
            let end = format!("\"{}", "#".repeat(hashes));
            let begins = 2 + hashes;
            rest[begins..].find(&end).map_or(rest.len(), |at| begins + at + end.len())
        } else if let Some(length) = character(rest) {
            code.push_str("' '");
            length
        } else {
            code.push(first);
            first.len_utf8()
        };
        rest = &rest[skipped..];
    }
    code
}

/// Where a text in quotes ends.
fn end_of_text(rest: &str) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            '"' if !escaped => return at + 1,
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    rest.len()
}

/// The number of hashes of a raw text that begins here.
fn raw_text(rest: &str, before: &str) -> Option<usize> {
    let in_word = before.ends_with(|c: char| c.is_alphanumeric() || c == '_') && !before.ends_with('b');
    let hashes = rest.strip_prefix('r').filter(|_| !in_word)?;
    let count = hashes.len() - hashes.trim_start_matches('#').len();
    hashes[count..].starts_with('"').then_some(count)
}

/// The length of a character in quotes, which a lifetime is not.
fn character(rest: &str) -> Option<usize> {
    let inside = rest.strip_prefix('\'')?;
    if let Some(escaped) = inside.strip_prefix('\\') {
        let end = escaped.char_indices().skip(1).find(|(_, c)| *c == '\'')?.0;
        return Some(2 + end + 1);
    }
    let c = inside.chars().next()?;
    inside[c.len_utf8()..].starts_with('\'').then_some(2 + c.len_utf8())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_is_counted() {
        let source = r####"
            // unsafe in a comment, with "a quote
            /* unsafe */ fn a<'x>(b: &'x str) -> char { let _ = "unsafe \" unsafe"; '"' }
            unsafe fn c() { /* SAFETY: none */ unsafe { d() } }
            const E: &str = r#"unsafe "unsafe" "#; const F: char = '\''; let unsafely = '\u{7f}';
            unsafe impl G for H {}
        "####;
        assert_eq!(uses(&code_of(source)), 3);
        assert_eq!(code_of(source).lines().filter(|line| !line.trim().is_empty()).count(), 4);
    }

    #[test]
    fn all_crates_are_counted() {
        let summary = summary().unwrap();
        assert!(summary.contains("enlightenment 0 in "), "{summary}");
        assert!(!summary.contains("guest-probe-ebpf 0 in "), "{summary}");
    }
}
