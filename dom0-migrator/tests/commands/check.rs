//! `check`: what it finds, by name, and that nothing is begun by it.

use super::*;

/// A disk of a domain, as its backend's nodes name it.
fn give_disk(host: &Host, domain: u32, kind: &str, parameters: &str) {
    let node = host.directory.path().join(format!("xs/local/domain/0/backend/vbd/{domain}/51712"));
    fs::create_dir_all(&node).unwrap();
    for (name, value) in [("dev", "xvda"), ("type", kind), ("params", parameters), ("device-type", "disk")] {
        fs::write(node.join(name), value).unwrap();
    }
}

fn give_memory(host: &Host, domain: u32, mebibytes: u64) {
    let node = host.node(domain).join("memory");
    fs::create_dir_all(&node).unwrap();
    fs::write(node.join("target"), (mebibytes << 10).to_string()).unwrap();
}

/// What `check --json` says, and its exit code.
fn check(source: &Host, address: &str) -> (i32, serde_json::Value) {
    let mut command = source.command("");
    command.args(["check", "db1", address, "--json", "--connections", "2"]).args(&source.connecting);
    let output = command.output().unwrap();
    let json = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!(
            "{error}: {} {}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    });
    (output.status.code().unwrap(), json)
}

fn obstacles(json: &serde_json::Value) -> Vec<&str> {
    json["obstacles"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect()
}

/// A disk's image of 4 MB, no page of which is like another.
fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(file.path(), bytes).unwrap();
    file
}

#[test]
fn a_dry_run_measures_names_what_is_in_the_way_and_begins_nothing() {
    let (all, own) = certificates();
    let image = image();
    let source = Host::new().with_domain(3, "db1").with_certificates(&all.path().join("host-b"));
    give_disk(&source, 3, "phy", image.path().to_str().unwrap());
    give_memory(&source, 3, 512);
    let target = Host::new().with_certificates(&own);
    let receiver = target.receive("", &[]);
    let (code, json) = check(&source, &receiver.address);
    // No Xen runs here, so nothing would go by reference; it is named on both sides, and nothing else is.
    assert_eq!(obstacles(&json), ["source-xen", "target-helper"], "{json:#}");
    assert_eq!(code, i32::from(EXIT_FAILED));
    assert_eq!(json["memory_bytes"], 512 << 20);
    for measured in ["link", "storage"] {
        assert!(
            json[measured]["bytes"].as_u64().unwrap() > 0
                && json[measured]["seconds"].as_f64().unwrap() > 0.0
        );
    }
    let link = json["link"]["bytes"].as_f64().unwrap() / json["link"]["seconds"].as_f64().unwrap();
    let estimate = &json["estimate"];
    let seconds = estimate["stock"]["seconds"].as_f64().unwrap();
    assert!((seconds * link / (f64::from(512 << 20) * 4104.0 / 4096.0) - 1.0).abs() < 1e-6, "{json:#}");
    assert_eq!(estimate["stock"], estimate["poolskip"]);
    assert_eq!((source.domains(), source.state("db1")), (vec!["db1".to_owned()], "running".to_owned()));
    assert!(
        target.domains().is_empty() && target.records("list").is_empty() && source.records("list").is_empty()
    );
    // And a migration goes as it would have.
    source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
}

#[test]
fn every_obstacle_has_its_name_and_a_way_out() {
    let source = Host::new().with_domain(3, "db1");
    let target = Host::new().with_domain(5, "db1--incoming");
    give_memory(&source, 3, 512);
    give_disk(&source, 3, "tap", "/somewhere");
    fs::create_dir_all(source.directory.path().join("xs/local/domain/0/backend/pci/3/0")).unwrap();
    fs::write(target.directory.path().join("xs/free_memory"), "100").unwrap();
    let receiver = target.receive("", &[]);
    let (code, json) = check(&source, &receiver.address);
    assert_eq!(code, i32::from(EXIT_NOT_BEGUN), "{json:#}");
    let mut names = obstacles(&json);
    names.sort_unstable();
    let expected =
        ["disk-without-references", "memory", "passthrough", "source-xen", "target-helper", "target-refuses"];
    assert_eq!(names, expected, "{json:#}");
    for obstacle in json["obstacles"].as_array().unwrap() {
        assert!(
            !obstacle["way_out"].as_str().unwrap().is_empty()
                && !obstacle["what"].as_str().unwrap().is_empty()
        );
    }
    assert_eq!(target.domains(), ["db1--incoming"]);
    // For people, the worst comes first.
    let output = source.command("").args(["check", "db1", &receiver.address, "--plain"]).output().unwrap();
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    let first = words.lines().find(|line| line.contains('!')).unwrap();
    assert!(first.contains("it would not begin") && words.contains("way out: "), "{words}");
}

#[test]
fn a_target_that_is_not_there_is_an_obstacle_too() {
    let source = Host::new().with_domain(3, "db1");
    let (code, json) = check(&source, &free_address());
    assert_eq!(code, i32::from(EXIT_NOT_BEGUN));
    assert!(obstacles(&json).contains(&"target-unreachable"), "{json:#}");
    assert_eq!(json["estimate"], serde_json::Value::Null);
    // A peer that does not know the question closes the connection.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let closing = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream);
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        lines.read_line(&mut line).unwrap();
    });
    let (code, json) = check(&source, &address);
    closing.join().unwrap();
    assert_eq!(code, i32::from(EXIT_NOT_BEGUN));
    assert!(obstacles(&json).contains(&"target-silent"), "{json:#}");
    let unknown = source.command("").args(["check", "db9", &address, "--plain"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(i32::from(EXIT_NOT_BEGUN)));
}

#[test]
fn a_target_without_memory_or_disk_refuses_before_anything_is_begun() {
    let source = Host::new().with_domain(3, "db1");
    let target = Host::new();
    give_memory(&source, 3, 512);
    let receiver = target.receive("", &[]);
    let free = target.directory.path().join("xs/free_memory");
    fs::write(&free, "100").unwrap();
    let refused = |part: &str| {
        let ended = source.migrate("", "db1", &receiver.address);
        assert_eq!(ended.code, i32::from(EXIT_NOT_BEGUN), "{}", ended.stderr);
        assert!(ended.stderr.contains(part), "{}", ended.stderr);
        assert!(target.records("list").is_empty() && source.records("list").is_empty());
    };
    refused("100 MiB of memory are free here, the domain needs 512");
    fs::write(&free, "600").unwrap();
    give_disk(&source, 3, "phy", "/nowhere/disk");
    refused("a disk of the domain is not here: /nowhere/disk");
    let (code, json) = check(&source, &receiver.address);
    assert!(code == i32::from(EXIT_NOT_BEGUN) && obstacles(&json).contains(&"target-refuses"), "{json:#}");
    // What a script of the domain's own attaches need not be there before.
    let script = source.directory.path().join("xs/local/domain/0/backend/vbd/3/51712/script");
    fs::write(script, "/etc/xen/scripts/own").unwrap();
    source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
    runs_only_at(&target, &source);
}
