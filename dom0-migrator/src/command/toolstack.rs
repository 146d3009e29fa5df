//! `enable` and `disable`: that the toolstack which people have goes through this program, and that it does no more.
//!
//! * **xl**: `/usr/local/sbin/xl`, which is found before `/usr/sbin/xl`. It hands `xl migrate` to this program
//!   ([`as_xl`](super::as_xl)), and everything else to the real xl. No package's file is changed, and where this program is gone the real
//!   xl does all.
//! * **libvirt**: a drop-in for `libvirtd.service` and `virtxend.service` with `LIBXL_SAVE_HELPER`.
//!
//! Both say what they did, may be called again, and leave nothing behind that was not there before.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{Args, ValueEnum};

use super::{EXIT_FAILED, EXIT_MIGRATED};

/// What every file of ours says in its second line, by which it is known.
const MARK: &str = "# Poolskip's, made by `dom0-migrator enable`; `dom0-migrator disable` removes it.";

/// Where xl's stand-in lies, and the real one, below the root.
const STAND_IN: &str = "usr/local/sbin/xl";
const REAL: &str = "usr/sbin/xl";

/// Services of libvirt in which its driver for Xen runs: the one for all drivers, and the one for Xen alone.
const SERVICES: [&str; 2] = ["libvirtd.service", "virtxend.service"];
/// Where units of packages lie.
const UNITS: [&str; 2] = ["lib/systemd/system", "usr/lib/systemd/system"];

/// A toolstack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Toolstack {
    /// Xen's own xl
    Xl,
    /// libvirt's libxl driver
    Libvirt,
}

/// Options of `enable`.
#[derive(Args, Clone, Debug)]
pub struct Enable {
    /// The toolstack that is to use it
    #[arg(value_enum)]
    pub toolstack: Toolstack,
    /// The root of another system that is to be changed, of an image, say
    #[arg(long, value_name = "DIRECTORY", default_value = "/")]
    pub root: PathBuf,
}

/// What `disable` undoes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Undone {
    /// `enable xl`
    Xl,
    /// `enable libvirt`
    Libvirt,
    /// Whatever is enabled
    All,
}

/// Options of `disable`.
#[derive(Args, Clone, Debug)]
pub struct Disable {
    /// The toolstack that is to do without it again
    #[arg(value_enum)]
    pub toolstack: Undone,
    /// The root of another system that is to be changed, of an image, say
    #[arg(long, value_name = "DIRECTORY", default_value = "/")]
    pub root: PathBuf,
}

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ToolstackError {
    /// A file.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no such toolstack.
    #[error("{0}, so there is nothing to enable; install it first")]
    Absent(String),
    /// Somebody else's file is in the way.
    #[error(
        "{0} is there already, and is not Poolskip's; nothing was changed (an xl that was built from source lies there: `dom0-migrator migrate` needs no `enable`)"
    )]
    Foreign(PathBuf),
    /// A path that a shell script or a unit cannot hold.
    #[error(
        "{0:?}: a path with such characters cannot be put into a script or a unit; install the program somewhere else"
    )]
    Path(PathBuf),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> ToolstackError + '_ {
    move |source| ToolstackError::Io { path: path.to_owned(), source }
}

/// Enables a toolstack.
pub fn enable(options: &Enable) -> u8 {
    let program = match program(&options.root) {
        Ok(program) => program,
        Err(error) => return failed(&error),
    };
    let done = match options.toolstack {
        Toolstack::Xl => enable_xl(&options.root, &program),
        Toolstack::Libvirt => enable_libvirt(&options.root, &program),
    };
    match done {
        Ok(lines) => say(&lines),
        Err(error) => failed(&error),
    }
}

/// Disables one, or all.
pub fn disable(options: &Disable) -> u8 {
    let mut lines = Vec::new();
    if matches!(options.toolstack, Undone::Xl | Undone::All) {
        match disable_xl(&options.root) {
            Ok(more) => lines.extend(more),
            Err(error) => return failed(&error),
        }
    }
    if matches!(options.toolstack, Undone::Libvirt | Undone::All) {
        match disable_libvirt(&options.root) {
            Ok(more) => lines.extend(more),
            Err(error) => return failed(&error),
        }
    }
    say(&lines)
}

fn say(lines: &[String]) -> u8 {
    for line in lines {
        println!("{line}");
    }
    EXIT_MIGRATED
}

fn failed(error: &ToolstackError) -> u8 {
    eprintln!("dom0-migrator: {error}");
    EXIT_FAILED
}

/// Where this program is, as the other system will find it.
fn program(root: &Path) -> Result<PathBuf, ToolstackError> {
    let program = if root == Path::new("/") {
        std::env::current_exe().map_err(at(Path::new("this program")))?
    } else {
        PathBuf::from("/usr/sbin/dom0-migrator")
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_' | '+');
    match program.to_str() {
        Some(text) if text.chars().all(plain) => Ok(program),
        _ => Err(ToolstackError::Path(program)),
    }
}

fn stand_in(program: &Path) -> String {
    format!(
        "#!/bin/sh\n{MARK}\n\
         # `xl migrate` goes to dom0-migrator, which hands on what is not for it; everything else is the real xl's. So is all of it where\n\
         # dom0-migrator is gone, or is the one who calls.\n\
         program={program}\n\
         if [ -z \"${{LIBXL_SAVE_HELPER:-}}${{POOLSKIP_HANDOFF:-}}\" ] && [ -x \"$program\" ]; then\n\
         \x20   for word in \"$@\"; do\n\
         \x20       case \"$word\" in\n\
         \x20       -*) ;;\n\
         \x20       migrate) exec \"$program\" as-xl /{REAL} \"$@\" ;;\n\
         \x20       *) break ;;\n\
         \x20       esac\n\
         \x20   done\n\
         fi\n\
         exec /{REAL} \"$@\"\n",
        program = program.display()
    )
}

fn drop_in(program: &Path) -> String {
    format!("[Service]\n{MARK}\nEnvironment=LIBXL_SAVE_HELPER={program}\n", program = program.display())
}

/// Whether a file is there, and ours.
fn is_ours(path: &Path) -> Result<Option<bool>, ToolstackError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).lines().nth(1) == Some(MARK))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at(path)(error)),
    }
}

/// Writes a file of ours as a whole; false when it was so already.
fn put(path: &Path, text: &str, mode: u32) -> Result<bool, ToolstackError> {
    if is_ours(path)? == Some(false) {
        return Err(ToolstackError::Foreign(path.to_owned()));
    }
    if fs::read(path).is_ok_and(|found| found == text.as_bytes()) {
        return Ok(false);
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory).map_err(at(directory))?;
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(at(path))?;
    file.write_all(text.as_bytes()).map_err(at(path))?;
    file.as_file().set_permissions(fs::Permissions::from_mode(mode)).map_err(at(path))?;
    file.persist(path).map_err(|error| at(path)(error.error))?;
    Ok(true)
}

/// Removes a file of ours; says what it did when there was one.
fn take_away(path: &Path) -> Result<Option<String>, ToolstackError> {
    match is_ours(path)? {
        None => Ok(None),
        Some(false) => Ok(Some(format!("{} is not Poolskip's, and stays", path.display()))),
        Some(true) => {
            fs::remove_file(path).map_err(at(path))?;
            Ok(Some(format!("{} is removed", path.display())))
        }
    }
}

fn enable_xl(root: &Path, program: &Path) -> Result<Vec<String>, ToolstackError> {
    let (path, real) = (root.join(STAND_IN), root.join(REAL));
    if is_ours(&path)? == Some(false) {
        return Err(ToolstackError::Foreign(path));
    }
    if !real.exists() {
        return Err(ToolstackError::Absent(format!("there is no {}", real.display())));
    }
    Ok(vec![if put(&path, &stand_in(program), 0o755)? {
        format!(
            "{} is made: `xl migrate DOMAIN HOST` goes through Poolskip where HOST receives",
            path.display()
        )
    } else {
        format!("{} is there already", path.display())
    }])
}

fn disable_xl(root: &Path) -> Result<Vec<String>, ToolstackError> {
    Ok(vec![take_away(&root.join(STAND_IN))?.unwrap_or_else(|| "xl: not enabled".into())])
}

fn drop_in_path(root: &Path, service: &str) -> PathBuf {
    root.join("etc/systemd/system").join(format!("{service}.d")).join("poolskip.conf")
}

fn enable_libvirt(root: &Path, program: &Path) -> Result<Vec<String>, ToolstackError> {
    let here: Vec<&str> = SERVICES
        .into_iter()
        .filter(|service| UNITS.iter().any(|units| root.join(units).join(service).exists()))
        .collect();
    if here.is_empty() {
        return Err(ToolstackError::Absent(format!("there is neither {}", SERVICES.join(" nor "))));
    }
    let mut lines = Vec::new();
    let mut changed = Vec::new();
    for service in here {
        let path = drop_in_path(root, service);
        if put(&path, &drop_in(program), 0o644)? {
            changed.push(service);
            lines.push(format!("{} is made", path.display()));
        } else {
            lines.push(format!("{} is there already", path.display()));
        }
    }
    if !changed.is_empty() {
        reload(root);
        lines.push(format!(
            "it holds once they start again: `systemctl try-restart {}` (domains run on meanwhile)",
            changed.join(" ")
        ));
    }
    Ok(lines)
}

fn disable_libvirt(root: &Path) -> Result<Vec<String>, ToolstackError> {
    let mut lines = Vec::new();
    let mut changed = Vec::new();
    for service in SERVICES {
        let path = drop_in_path(root, service);
        let Some(line) = take_away(&path)? else { continue };
        if !path.exists() {
            changed.push(service);
            if let Some(directory) = path.parent() {
                // Others may have drop-ins there too.
                let _ = fs::remove_dir(directory);
            }
        }
        lines.push(line);
    }
    if !changed.is_empty() {
        reload(root);
        lines.push(format!(
            "it holds once they start again: `systemctl try-restart {}` (domains run on meanwhile)",
            changed.join(" ")
        ));
    }
    if lines.is_empty() {
        lines.push("libvirt: not enabled".into());
    }
    Ok(lines)
}

/// Has systemd read its units anew, where it runs this very system.
fn reload(root: &Path) {
    if root != Path::new("/") || !Path::new("/run/systemd/system").exists() {
        return;
    }
    match Command::new("systemctl").arg("daemon-reload").status() {
        Ok(status) if status.success() => {}
        Ok(status) => eprintln!("dom0-migrator: systemctl daemon-reload ended with {status}"),
        Err(error) => eprintln!("dom0-migrator: systemctl: {error}"),
    }
}

/// Toolstacks that go through Poolskip on this host, and for each the program that they start: for `doctor`.
pub fn enabled(root: &Path) -> Vec<(&'static str, PathBuf)> {
    let named = |path: &Path, prefix: &str| {
        let text = fs::read_to_string(path).ok().filter(|text| text.lines().nth(1) == Some(MARK))?;
        text.lines().find_map(|line| line.strip_prefix(prefix).map(PathBuf::from))
    };
    let mut all = Vec::new();
    all.extend(named(&root.join(STAND_IN), "program=").map(|program| ("xl", program)));
    for service in SERVICES {
        let path = drop_in_path(root, service);
        all.extend(named(&path, "Environment=LIBXL_SAVE_HELPER=").map(|program| (service, program)));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// All files below a root, with their content.
    fn files(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        let mut open = vec![root.to_owned()];
        while let Some(directory) = open.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    found.insert(path.clone(), Vec::new());
                    open.push(path);
                } else {
                    found.insert(path.clone(), fs::read(&path).unwrap());
                }
            }
        }
        found
    }

    fn system() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for directory in ["usr/sbin", "usr/local/sbin", "lib/systemd/system", "etc/systemd/system"] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        let xl = root.path().join(REAL);
        fs::write(&xl, "#!/bin/sh\necho real \"$@\"\n").unwrap();
        fs::set_permissions(&xl, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(root.path().join("lib/systemd/system/libvirtd.service"), "").unwrap();
        root
    }

    #[test]
    fn enabled_and_disabled_again_leaves_no_trace() {
        let root = system();
        let (root, program) = (root.path(), Path::new("/usr/sbin/dom0-migrator"));
        let before = files(root);
        for _ in 0..2 {
            enable_xl(root, program).unwrap();
            enable_libvirt(root, program).unwrap();
        }
        assert_eq!(enabled(root), [("xl", program.to_owned()), ("libvirtd.service", program.to_owned())]);
        let drop_in = fs::read_to_string(drop_in_path(root, "libvirtd.service")).unwrap();
        assert!(drop_in.contains("\nEnvironment=LIBXL_SAVE_HELPER=/usr/sbin/dom0-migrator\n"), "{drop_in}");
        assert!(!drop_in_path(root, "virtxend.service").exists());
        for _ in 0..2 {
            disable_xl(root).unwrap();
            disable_libvirt(root).unwrap();
        }
        assert_eq!(files(root), before);
        assert!(enabled(root).is_empty());
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let root = system();
        let (root, program) = (root.path(), Path::new("/usr/sbin/dom0-migrator"));
        fs::write(root.join(STAND_IN), "an xl of one's own\nline\n").unwrap();
        let theirs = drop_in_path(root, "libvirtd.service");
        fs::create_dir_all(theirs.parent().unwrap()).unwrap();
        fs::write(theirs.with_file_name("other.conf"), "[Service]\n").unwrap();
        let before = files(root);
        assert!(matches!(enable_xl(root, program), Err(ToolstackError::Foreign(_))));
        assert!(disable_xl(root).unwrap()[0].contains("stays"));
        enable_libvirt(root, program).unwrap();
        disable_libvirt(root).unwrap();
        assert_eq!(files(root), before);
    }

    #[test]
    fn where_there_is_no_toolstack_nothing_is_made() {
        let root = tempfile::tempdir().unwrap();
        let program = Path::new("/usr/sbin/dom0-migrator");
        assert!(matches!(enable_xl(root.path(), program), Err(ToolstackError::Absent(_))));
        assert!(matches!(enable_libvirt(root.path(), program), Err(ToolstackError::Absent(_))));
        assert!(files(root.path()).is_empty());
    }

    /// What the script starts, with this program and the real xl replaced by ones that say so.
    fn started(words: &[&str], environment: &[(&str, &str)], with_program: bool) -> String {
        let root = system();
        let program = root.path().join("usr/sbin/dom0-migrator");
        if with_program {
            fs::write(&program, "#!/bin/sh\necho poolskip \"$@\"\n").unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let script =
            stand_in(&program).replace(&format!("/{REAL}"), &root.path().join(REAL).display().to_string());
        let output = Command::new("sh")
            .args(["-c", &script, "xl"])
            .args(words)
            .env_remove("LIBXL_SAVE_HELPER")
            .env_remove("POOLSKIP_HANDOFF")
            .envs(environment.iter().copied())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        said.replace(&root.path().display().to_string(), "")
    }

    #[test]
    fn only_migrate_goes_to_this_program() {
        let to_us = "poolskip as-xl /usr/sbin/xl -vv migrate db1 b\n";
        assert_eq!(started(&["-vv", "migrate", "db1", "b"], &[], true), to_us);
        for words in [&["list"][..], &["migrate-receive"], &["create", "migrate"], &[]] {
            assert_eq!(
                started(words, &[], true),
                format!("real {}", words.join(" ")).trim_end().to_owned() + "\n"
            );
        }
        let real = "real migrate db1 b\n";
        assert_eq!(started(&["migrate", "db1", "b"], &[("POOLSKIP_HANDOFF", "/x")], true), real);
        assert_eq!(started(&["migrate", "db1", "b"], &[("LIBXL_SAVE_HELPER", "/x")], true), real);
        // The program was removed, and the script was not.
        assert_eq!(started(&["migrate", "db1", "b"], &[], false), real);
    }
}
