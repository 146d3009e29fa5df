//! What an operator does before and beside a migration: sockets from systemd, `doctor`, `pair`, `xl migrate` through Poolskip.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::process::CommandExt as _;

use super::*;

/// Has `descriptor` be number 3 in the program, as systemd passes sockets; `sh` sets LISTEN_PID, which only the process itself knows.
fn passed(host: &Host, descriptor: RawFd, arguments: &str) -> Command {
    let inner = host.command("");
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" receive {arguments}")])
        .arg(env!("CARGO_BIN_EXE_dom0-migrator"))
        .envs(inner.get_envs().filter_map(|(key, value)| Some((key, value?))))
        .stderr(Stdio::piped());
    let pass = move || {
        let done = if descriptor == 3 {
            // SAFETY: a plain system call with integers.
            unsafe { libc::fcntl(3, libc::F_SETFD, 0) }
        } else {
            // SAFETY: the same; the copy stays open across exec.
            unsafe { libc::dup2(descriptor, 3) }
        };
        if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(pass) };
    command
}

#[test]
fn sockets_that_systemd_has_opened_are_listened_on() {
    let (source, target) = pair();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut child = passed(&target, listener.as_raw_fd(), "--plain --once").spawn().unwrap();
    // Before it says that it is ready: systemd's socket takes what comes until then.
    source.migrate("", "db1", &address).expect(EXIT_MIGRATED, "migrated");
    assert_eq!(child.wait().unwrap().code(), Some(i32::from(EXIT_MIGRATED)));
    runs_only_at(&target, &source);
}

#[test]
fn sockets_beside_an_address_and_things_that_are_no_sockets_are_refused() {
    let target = Host::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ended = |descriptor, arguments| {
        let output = passed(&target, descriptor, arguments).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = ended(listener.as_raw_fd(), "--plain --listen 127.0.0.1:1");
    assert!(code == Some(i32::from(EXIT_NOT_BEGUN)) && said.contains("leave one of the two out"), "{said}");
    let file = fs::File::open("/dev/null").unwrap();
    let (code, said) = ended(file.as_raw_fd(), "--plain");
    assert!(code == Some(i32::from(EXIT_NOT_BEGUN)) && said.contains("descriptor 3 from systemd"), "{said}");
}

/// Puts a disk into a domain, as its backend's nodes say.
fn with_disk(host: &Host, domain: u32, vdev: u32, path: &Path) {
    let node = host.directory.path().join(format!("xs/local/domain/0/backend/vbd/{domain}/{vdev}"));
    fs::create_dir_all(&node).unwrap();
    for (name, value) in
        [("dev", "xvda"), ("type", "phy"), ("params", path.to_str().unwrap()), ("device-type", "disk")]
    {
        fs::write(node.join(name), value).unwrap();
    }
}

fn findings<'a>(report: &'a serde_json::Value, section: &str) -> Vec<(&'a str, &'a str, &'a str)> {
    let text = |finding: &'a serde_json::Value, key: &str| finding[key].as_str().unwrap();
    let all = report[section].as_array().unwrap();
    all.iter().map(|one| (text(one, "what"), text(one, "state"), text(one, "found"))).collect()
}

fn doctor(host: &Host, arguments: &[&str]) -> (Option<i32>, serde_json::Value, String) {
    let output =
        host.command("").args(["doctor", "--json"]).args(arguments).args(&host.connecting).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    (output.status.code(), report, said)
}

/// This machine runs no Xen, which is what is bad of it.
#[test]
fn doctor_says_what_is_missing_and_what_there_is_between_two_hosts() {
    let (_all, own) = certificates();
    let (source, target) = pair();
    let (source, target) = (source.with_certificates(&own), target.with_certificates(&own));
    let mut disk = tempfile::NamedTempFile::new().unwrap();
    disk.write_all(&(0..1_u32 << 20).flat_map(u32::to_le_bytes).collect::<Vec<u8>>()).unwrap();
    disk.as_file().sync_all().unwrap();
    with_disk(&source, 3, 51712, disk.path());
    with_disk(&source, 3, 51728, Path::new("/nowhere/disk"));
    let receiver = target.receive("", &[]);
    let (code, report, said) = doctor(&source, &[&receiver.address]);
    assert_eq!(code, Some(i32::from(EXIT_FAILED)), "{said}");
    let here = findings(&report, "here");
    let one = |all: &[(&str, &str, &str)], what: &str| {
        let found = all.iter().find(|(name, ..)| name.starts_with(what));
        let (_, state, found) = found.unwrap_or_else(|| panic!("no {what} in {report:#}"));
        ((*state).to_owned(), (*found).to_owned())
    };
    let (state, found) = one(&here, "Xen");
    assert!(state == "bad" && found.contains("/sys/hypervisor/version"), "{found}");
    assert_eq!(one(&here, "this host's certificate").0, "good");
    assert_eq!(one(&here, "memory for domains"), ("good".into(), "2048 MiB are free".into()));
    assert_eq!(one(&here, &format!("disk {}", disk.path().display())).0, "good");
    assert_eq!(one(&here, "disk xvda").0, "warning");
    assert_eq!(one(&here, "records").0, "good");
    // The other one's own words.
    assert_eq!(one(&findings(&report, "there"), "Xen").0, "bad");
    let between = findings(&report, "between");
    assert_eq!(
        one(&between, "connection"),
        ("good".into(), "encrypted, both sides known by their certificates".into())
    );
    let (state, found) = one(&between, &format!("disk {} of db1", disk.path().display()));
    assert!(state == "good" && found.starts_with("the same there, by "), "{found}");
    assert_eq!(one(&between, "clocks").0, "good");
    let (state, found) = one(&between, "link");
    assert!(state == "good" && found.contains("MB/s on one connection, encrypted"), "{found}");
    assert_eq!(one(&between, "room there").1, "2048 MiB for domains");
    // A migration goes on beside, and after.
    drop(receiver);
    let (code, report, _) = doctor(&source, &["127.0.0.1:1"]);
    assert_eq!(code, Some(i32::from(EXIT_FAILED)));
    assert_eq!(one(&findings(&report, "between"), "connection").0, "bad");
}

#[test]
fn doctor_is_not_let_in_by_a_host_of_another_authority() {
    let ((_a, one), (_b, two)) = (certificates(), certificates());
    let target = Host::new().with_certificates(&one);
    let receiver = target.receive("", &[]);
    let (_, report, _) = doctor(&Host::new().with_certificates(&two), &[&receiver.address, "--no-link"]);
    assert_eq!(findings(&report, "between")[0].1, "bad");
}

/// An ssh that runs what it is told on "the other host": this machine, with another configuration.
fn stand_in_ssh(directory: &Path, configuration: &Path, code: Option<i32>) -> String {
    let path = directory.join("ssh");
    let program = env!("CARGO_BIN_EXE_dom0-migrator");
    let body = match code {
        Some(code) => format!("echo 'Permission denied (publickey).' >&2; exit {code}"),
        None => format!(
            "echo \"$1\" >>{0}/destinations; shift; dom0-migrator() {{ {program} --config {1} \"$@\"; }}; eval \"$(echo \"$*\" | sed 's/exec //')\"",
            directory.display(),
            configuration.display()
        ),
    };
    fs::write(&path, format!("#!/bin/bash\n{body}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.display().to_string()
}

#[test]
fn paired_hosts_know_each_other_and_a_second_time_changes_nothing() {
    let work = tempfile::tempdir().unwrap();
    let (here, there) = (work.path().join("here"), work.path().join("there"));
    let configure = |certificates: &Path| {
        let path = certificates.with_extension("toml");
        fs::write(&path, format!("certificates = \"{}\"\n", certificates.display())).unwrap();
        path
    };
    let (own, other) = (configure(&here), configure(&there));
    let authority = work.path().join("authority").display().to_string();
    let ssh = stand_in_ssh(work.path(), &other, None);
    let pair = |options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dom0-migrator"));
        command
            .arg("--config")
            .arg(&own)
            .args(["pair", "127.0.0.1", "--authority", &authority])
            .args(options);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    // Not let in: nothing is made.
    let refused = stand_in_ssh(&work.path().join("."), &other, Some(255));
    let (code, said) = pair(&["--ssh", &refused]);
    assert!(
        code == Some(i32::from(EXIT_FAILED)) && said.contains("nothing was changed on either host"),
        "{said}"
    );
    assert!(!here.exists() && !there.exists() && !Path::new(&authority).exists());
    let ssh_path = stand_in_ssh(work.path(), &other, None);
    assert_eq!(ssh, ssh_path);
    let (code, said) = pair(&["--ssh", &ssh, "--name", "127.0.0.1"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(
        fs::read_to_string(work.path().join("destinations")).unwrap(),
        "root@127.0.0.1\nroot@127.0.0.1\n"
    );
    // They migrate.
    let source = Host::new().with_domain(3, "db1").with_certificates(&here);
    let target = Host::new().with_certificates(&there);
    let receiver = target.receive("", &[]);
    source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
    let read = || [&here, &there].map(|directory| fs::read(directory.join("certificate.pem")).unwrap());
    let before = read();
    let (code, said) = pair(&["--ssh", &ssh, "--name", "127.0.0.1"]);
    assert!(code == Some(0) && said.matches("has a certificate of it already").count() == 2, "{said}");
    assert_eq!(read(), before);
    assert!(!there.with_file_name("there.pending").exists());
    let (code, said) = pair(&["--ssh", &ssh, "--name", "127.0.0.1", "--renew"]);
    assert_eq!(code, Some(0), "{said}");
    assert_ne!(read(), before);
    // The authority is elsewhere: nothing is begun anew by accident.
    fs::remove_dir_all(&authority).unwrap();
    let (code, said) = pair(&["--ssh", &ssh]);
    assert!(
        code == Some(i32::from(EXIT_FAILED)) && said.contains("run `pair` on the host where it is"),
        "{said}"
    );
    assert!(!Path::new(&authority).exists());
}

/// `xl` as the script of `enable xl` calls it, with `host`'s xl as the real one.
fn as_xl(host: &Host, words: &[&str]) -> (Option<i32>, String) {
    let configuration = host.directory.path().join("migrator.toml");
    fs::write(&configuration, "plain = true\n").unwrap();
    let real = host.directory.path().join("xl");
    let mut child = host
        .command("")
        .arg("--config")
        .arg(&configuration)
        .arg("as-xl")
        .arg(&real)
        .args(words)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (child.wait().unwrap().code(), said)
}

#[test]
fn xl_migrate_goes_through_poolskip_where_somebody_receives_and_is_plain_where_nobody_does() {
    let (source, target) = pair();
    let receiver = target.receive("", &[]);
    let (code, said) = as_xl(&source, &["-v", "migrate", "db1", &format!("root@{}", receiver.address)]);
    assert_eq!(code, Some(0), "{said}");
    runs_only_at(&target, &source);
    // Nobody listens: the real xl does what it can, which here is to say that it has no such domain.
    let (_, said) = as_xl(&source, &["migrate", "db1", "127.0.0.1:1"]);
    assert!(
        said.contains("nobody receives at 127.0.0.1:1") && said.contains("a plain `xl migrate` follows"),
        "{said}"
    );
    let (_, said) = as_xl(&source, &["migrate", "-s", "ssh", "db1", &receiver.address]);
    assert!(said.contains("-s is for xl alone"), "{said}");
    let (_, said) = as_xl(&source, &["vcpu-list"]);
    assert!(said.contains("xl vcpu-list: not needed so far") && !said.contains("poolskip"), "{said}");
}

fn with_memory(host: Host, id: u32, mib: u64) -> Host {
    let node = host.node(id).join("memory");
    fs::create_dir_all(&node).unwrap();
    fs::write(node.join("static-max"), (mib * 1024).to_string()).unwrap();
    host
}

fn evacuate(host: &Host, options: &[&str]) -> (Option<i32>, String, String) {
    let output = host.command("").arg("evacuate").args(&host.connecting).args(options).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_host_is_evacuated_by_a_plan_and_what_has_no_room_stays() {
    let source = Host::new().with_domain(3, "db1").with_domain(4, "huge").with_domain(5, "pci");
    let source = with_memory(with_memory(with_memory(source, 3, 512), 4, 4096), 5, 16);
    fs::create_dir_all(source.directory.path().join("xs/local/domain/0/backend/pci/5/0")).unwrap();
    let target = Host::new();
    let receiver = target.receive("", &[]);
    let to = format!("--to={},127.0.0.1:1", receiver.address);
    let (code, said, errors) = evacuate(&source, &[&to, "--dry-run"]);
    assert_eq!(code, Some(i32::from(EXIT_FAILED)), "{said}{errors}");
    for words in [
        "127.0.0.1:1 takes nothing: ",
        &format!("1. db1                           512 MiB  to {}", receiver.address),
        "stays: it needs 4112 MiB; ",
        "stays: it has a PCI device of this host",
    ] {
        assert!(said.contains(words), "no {words:?} in:\n{said}");
    }
    assert_eq!(source.domains().len(), 3);
    let (code, said, errors) = evacuate(&source, &[&to]);
    assert_eq!(code, Some(i32::from(EXIT_FAILED)), "{said}{errors}");
    assert!(said.contains(&format!("1/1 db1 runs at {}", receiver.address)), "{said}{errors}");
    assert_eq!((target.domains(), target.state("db1")), (vec!["db1".to_owned()], "running".to_owned()));
    // What is left out is no failure, and nothing that goes is nothing to do.
    let (code, said, _) = evacuate(&source, &[&to, "--except", "huge,pci"]);
    assert!(code == Some(0) && said.contains("no domain is here"), "{said}");
    let (code, _, errors) = evacuate(&source, &[&to, "--only", "db9"]);
    assert!(code == Some(i32::from(EXIT_NOT_BEGUN)) && errors.contains("db9"), "{errors}");
}

#[test]
fn a_host_that_fails_is_followed_by_the_next_that_has_room() {
    let source = with_memory(Host::new().with_domain(3, "db1"), 3, 512);
    let (bad, good) = (Host::new(), Host::new());
    let (failing, receiving) = (bad.receive("target-dies", &[]), good.receive("", &[]));
    let to = format!("--to={},{}", failing.address, receiving.address);
    let (code, said, errors) = evacuate(&source, &[&to, "--json"]);
    assert_eq!(code, Some(0), "{said}{errors}");
    let outcome: serde_json::Value = serde_json::from_str(&said).unwrap();
    let done = &outcome["done"][0];
    assert_eq!((done["domain"].as_str(), done["code"].as_u64()), (Some("db1"), Some(0)), "{outcome:#}");
    // Both have the same room: which is first is not said; the domain runs on the one that can.
    assert_eq!(done["host"].as_str(), Some(receiving.address.as_str()));
    assert_eq!((good.domains(), bad.domains(), source.domains()), (vec!["db1".to_owned()], vec![], vec![]));
}

#[test]
fn an_evacuation_that_is_interrupted_leaves_domains_here_and_a_second_one_goes_on() {
    let source = with_memory(Host::new().with_domain(3, "db1"), 3, 512);
    let target = Host::new();
    let mut receiver = target.receive("target-mute", &[]);
    let mut child = source
        .command("")
        .arg("evacuate")
        .args(&source.connecting)
        .arg(format!("--to={}", receiver.address))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("the migration", || source.records("status") == [("sending".into(), true)]);
    // It may be before xl runs; then the migration ends all the same.
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(i32::from(EXIT_INTERRUPTED)));
    assert_eq!(source.state("db1"), "running");
    receiver.kill();
    let receiver = target.receive("", &[]);
    let (code, said, errors) = evacuate(&source, &[&format!("--to={}", receiver.address)]);
    assert_eq!(code, Some(0), "{said}{errors}");
    runs_only_at(&target, &source);
}
