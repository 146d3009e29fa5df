//! Tests of the pages in `docs`: every link leads somewhere, every command is one that the programs know, every error message that an operator
//! can meet has its line.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory as _};

use crate::deployment::root;

/// Pages that are read: all of `docs`, and those at the root.
fn pages() -> Vec<(PathBuf, String)> {
    let mut paths: Vec<PathBuf> = fs::read_dir(root().join("docs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    paths.extend(["README.md", "CONTRIBUTING.md", "kernel-module/README.md"].map(|name| root().join(name)));
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

/// A page's lines, and whether each is in a block of code, and which.
fn lines(text: &str) -> impl Iterator<Item = (Option<&str>, &str)> {
    let mut block = None;
    text.lines().filter_map(move |line| match line.trim_start().strip_prefix("```") {
        Some(kind) => {
            block = if block.is_some() { None } else { Some(kind) };
            None
        }
        None => Some((block, line)),
    })
}

/// The anchor that a heading gets.
fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    heading
        .trim_start_matches('#')
        .trim()
        .to_lowercase()
        .chars()
        .filter(kept)
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

fn anchors(text: &str) -> BTreeSet<String> {
    lines(text)
        .filter(|(block, line)| block.is_none() && line.starts_with('#'))
        .map(|(_, line)| anchor(line))
        .collect()
}

/// What `](…)` holds, outside of code.
fn links(text: &str) -> Vec<String> {
    let prose: String =
        lines(text).filter(|(block, _)| block.is_none()).map(|(_, line)| format!("{line}\n")).collect();
    prose.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0.to_owned())).collect()
}

#[test]
fn every_link_leads_somewhere() {
    let mut wrong = Vec::new();
    for (path, text) in pages() {
        for link in links(&text) {
            if link.contains("://") {
                continue;
            }
            let (file, fragment) =
                link.split_once('#').map_or((link.as_str(), None), |(file, part)| (file, Some(part)));
            let target = if file.is_empty() {
                path.clone()
            } else {
                path.parent().unwrap_or(Path::new("/")).join(file)
            };
            match (fs::read_to_string(&target), fragment) {
                (Err(_), _) if !target.exists() => wrong.push(format!("{}: {link}", path.display())),
                (Ok(text), Some(fragment)) if !anchors(&text).contains(fragment) => {
                    wrong.push(format!("{}: {link} names no heading", path.display()));
                }
                _ => {}
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_book_has_every_page_once() {
    let summary = fs::read_to_string(root().join("docs/SUMMARY.md")).unwrap();
    let listed = links(&summary);
    let named: BTreeSet<&str> = listed.iter().map(String::as_str).collect();
    assert_eq!(named.len(), listed.len(), "a page stands twice in SUMMARY.md");
    for (path, _) in
        pages().iter().filter(|(path, _)| path.parent().is_some_and(|parent| parent.ends_with("docs")))
    {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        assert!(name == "SUMMARY.md" || named.contains(name.as_str()), "{name} is not in SUMMARY.md");
    }
}

/// The programs that pages may call, with their definitions.
fn programs() -> [(&'static [&'static str], Command); 3] {
    [
        (&["cargo", "xtask"], crate::Cli::command()),
        (&["dom0-migrator"], dom0_migrator::command::CommandLine::command()),
        (&["guest-probe"], guest_probe::command_line::CommandLine::command()),
    ]
}

/// Others' programs, of which nothing is known here but that they are meant.
const OTHERS: &[&str] = &[
    "apt",
    "cargo",
    "env",
    "fio",
    "insmod",
    "mdbook",
    "modprobe",
    "openssl",
    "scp",
    "systemctl",
    "xl",
    "dkms",
    "./install.sh",
];

/// Words of a line as a shell would have them; pages need no more than this.
fn words(line: &str) -> Vec<String> {
    let line = line.split("  #").next().unwrap_or(line);
    line.split_whitespace().map(|word| word.trim_matches(['\'', '"']).to_owned()).collect()
}

/// The definition of the program that words call, and its own words.
fn called(words: &[String]) -> Option<(Command, &[String])> {
    programs().into_iter().find_map(|(name, command)| {
        let (head, rest) = words.split_at_checked(name.len())?;
        (head == name).then_some((command, rest))
    })
}

#[test]
fn every_command_that_is_shown_is_understood() {
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for (path, text) in pages() {
        for (block, line) in lines(&text) {
            if block != Some("console") {
                continue;
            }
            let Some(command) = line.strip_prefix("$ ").or_else(|| line.strip_prefix("# ")) else { continue };
            let all = words(command);
            match called(&all) {
                Some((definition, rest)) => {
                    seen += 1;
                    let name = ["program".to_owned()];
                    if let Err(error) =
                        definition.no_binary_name(false).try_get_matches_from(name.iter().chain(rest))
                    {
                        wrong.push(format!("{}: {command}: {error}", path.display()));
                    }
                }
                None if OTHERS.contains(&all.first().map_or("", String::as_str)) => {}
                None => wrong.push(format!("{}: what is {command:?}?", path.display())),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen >= 15, "only {seen} commands were found: does the test still read the pages?");
}

/// Commands in running text: their commands and options exist, whatever stands for the values.
#[test]
fn every_command_that_is_mentioned_exists() {
    let mut wrong = Vec::new();
    for (path, text) in pages() {
        let prose: String =
            lines(&text).filter(|(block, _)| block.is_none()).map(|(_, line)| format!("{line} ")).collect();
        for code in prose.split('`').skip(1).step_by(2) {
            let all = words(code);
            let Some((mut definition, rest)) = called(&all) else { continue };
            definition.build();
            let mut at = &definition;
            for word in rest {
                if let Some(option) = word.trim_start_matches('[').strip_prefix("--") {
                    let option =
                        option.trim_end_matches([']', ',', '.']).split('=').next().unwrap_or_default();
                    let known = at.get_arguments().any(|argument| argument.get_long() == Some(option));
                    if !known && !matches!(option, "help" | "version") {
                        wrong.push(format!("{}: `{code}`: no --{option}", path.display()));
                    }
                } else if at.has_subcommands() {
                    // `status|watch` names two.
                    let names: Vec<&str> = word.split('|').collect();
                    match names.iter().map(|name| at.find_subcommand(name)).collect::<Option<Vec<_>>>() {
                        Some(found) => at = found[0],
                        None if word.chars().all(|c| c.is_ascii_lowercase() || c == '-') => {
                            wrong.push(format!("{}: `{code}`: no command {word}", path.display()));
                        }
                        None => {}
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Sources of the messages that an operator can meet.
const MESSAGES: &[&str] = &[
    "dom0-migrator/src/command",
    "dom0-migrator/src/control.rs",
    "dom0-migrator/src/engine/disk.rs",
    "dom0-migrator/src/handover/record.rs",
    "dom0-migrator/src/helper/arguments.rs",
    "dom0-migrator/src/helper/mod.rs",
    "dom0-migrator/src/offer",
    "dom0-migrator/src/report_file/mod.rs",
    "dom0-migrator/src/xen/control.rs",
    "dom0-migrator/src/xen/library.rs",
    "dom0-migrator/src/xen/release.rs",
    "dom0-migrator/src/xenstore/client.rs",
    "guest-probe/src/catalogue/error.rs",
    "guest-probe/src/config.rs",
    "guest-probe/src/device.rs",
    "guest-probe/src/doctor.rs",
    "guest-probe/src/probes.rs",
    "guest-probe/src/process.rs",
    "guest-probe/src/service.rs",
    "guest-probe/src/status.rs",
];

/// A message is looked for by its longest part between two values; shorter ones than this say nothing by themselves.
const TELLING: usize = 14;

fn sources(path: &Path, into: &mut Vec<PathBuf>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            sources(&entry.unwrap().path(), into);
        }
    } else {
        into.push(path.to_owned());
    }
}

/// Texts of `#[error("…")]` in a source.
fn messages(source: &str) -> Vec<String> {
    let mut found = Vec::new();
    for rest in source.split("#[error(").skip(1) {
        let Some(rest) = rest.trim_start().strip_prefix('"') else { continue };
        let (mut text, mut chars) = (String::new(), rest.chars().peekable());
        while let Some(c) = chars.next() {
            match c {
                '"' => break,
                '\\' => match chars.next() {
                    // A line that goes on.
                    Some('\n') => while chars.next_if(|c| c.is_whitespace()).is_some() {},
                    Some('n') => text.push(' '),
                    Some(other) => text.push(other),
                    None => {}
                },
                c => text.push(c),
            }
        }
        found.push(text);
    }
    found
}

/// The longest part of a message that is the same each time.
fn telling(message: &str) -> &str {
    let parts = message.split('{').flat_map(|part| {
        match part.split_once('}') {
            Some((_, rest)) => rest,
            None => part,
        }
        .split('\0')
    });
    parts
        .map(|part| part.trim_matches([' ', ':', ';', ',', '(', ')']))
        .max_by_key(|part| part.len())
        .unwrap_or_default()
}

#[test]
fn every_message_that_an_operator_can_meet_is_explained() {
    let page = fs::read_to_string(root().join("docs/troubleshooting.md")).unwrap();
    let (mut missing, mut seen) = (Vec::new(), 0);
    let mut files = Vec::new();
    MESSAGES.iter().for_each(|path| sources(&root().join(path), &mut files));
    for file in files {
        let source = fs::read_to_string(&file).unwrap();
        for message in messages(&source) {
            let part = telling(&message);
            if part.len() >= TELLING {
                seen += 1;
                if !page.contains(part) {
                    missing.push(format!("{}: {message:?}, looked for by {part:?}", file.display()));
                }
            }
        }
    }
    assert!(missing.is_empty(), "not in docs/troubleshooting.md:\n{}", missing.join("\n"));
    assert!(seen >= 80, "only {seen} messages were found: does the test still read the sources?");
}

#[test]
fn messages_and_anchors_are_read_as_they_are() {
    let source = "#[error(\n  \"a {b} long \\\n   part: {0}\"\n)]\n#[error(transparent)]\n#[error(\"x\")]";
    assert_eq!(messages(source), ["a {b} long part: {0}", "x"]);
    assert_eq!(telling("a {b} long part: {0}"), "long part");
    assert_eq!(anchor("## What `--debug` compares, and more"), "what---debug-compares-and-more");
    assert_eq!(words("guest-probe run   # waits"), ["guest-probe", "run"]);
}
