//! Streams over several connections, and compressed ones.

use super::*;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

#[test]
fn a_stream_goes_over_as_many_connections_as_are_wanted_compressed_or_not() {
    let (_all, own) = certificates();
    for (secure, options, connections) in [
        (false, &[][..], Some(4)),
        (false, &["--connections", "1"][..], None),
        (true, &["--connections", "3", "--bandwidth", "5M"][..], Some(3)),
        (false, &["--connections", "1", "--compress", "lz4"][..], Some(1)),
        (true, &["--compress", "zstd"][..], Some(4)),
        (false, &["--compress", "auto", "--connections", "16"][..], Some(16)),
    ] {
        let (mut source, mut target) = pair();
        if secure {
            (source, target) = (source.with_certificates(&own), target.with_certificates(&own));
        }
        let receiver = target.receive("", &[]);
        source.connecting.extend(options.iter().map(|&option| option.to_owned()));
        let summary = source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated").summary;
        runs_only_at(&target, &source);
        let stream = &summary["stream"];
        assert_eq!(stream["connections"].as_u64(), connections, "{summary:#}");
        if connections.is_some() {
            let number = |name: &str| stream[name].as_u64().unwrap();
            assert!((1_000_000..1_001_000).contains(&number("bytes_before")), "{summary:#}");
            // The stand-in's memory is zeros.
            let (least, most) = match options.contains(&"lz4") || options.contains(&"zstd") {
                true => (1, 100_000),
                false => (1_000_000, 1_010_000),
            };
            assert!((least..most).contains(&number("bytes_after")), "{summary:#}");
            assert!(summary["wire_bytes"].as_u64().unwrap() > number("bytes_after"));
        }
        let path = fs::read_dir(source.reports()).unwrap().next().unwrap().unwrap().path();
        let report = report_file::parse(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(report.number("/stream/connections"), connections);
    }
}

/// A relay before a receiver, which does something to the connections of the stream.
struct Relay {
    address: String,
    /// Whether a connection was cut.
    has_cut: Arc<AtomicBool>,
}

impl Relay {
    /// `change` is given each line that begins a connection, and what follows goes on as it says: as it is, or cut after so many bytes.
    fn before(target: &str, change: impl Fn(&str, usize) -> Option<usize> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let target = target.to_owned();
        let has_cut = Arc::new(AtomicBool::new(false));
        let cuts = has_cut.clone();
        std::thread::spawn(move || {
            let streams = AtomicUsize::new(0);
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(&target) else { return };
                let mut greeting = Vec::new();
                let mut byte = [0];
                while (&near).read(&mut byte).is_ok_and(|length| length == 1) {
                    greeting.push(byte[0]);
                    if byte[0] == b'\n' {
                        break;
                    }
                }
                let greeting_text = String::from_utf8_lossy(&greeting).into_owned();
                let stream = greeting_text.contains("\"stream\"");
                let number = if stream { streams.fetch_add(1, Ordering::AcqRel) } else { usize::MAX };
                let most = if stream { change(&greeting_text, number) } else { None };
                (&far).write_all(&greeting).unwrap();
                let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                std::thread::spawn(move || pass(&back_from, &back_to, None));
                let cuts = cuts.clone();
                std::thread::spawn(move || {
                    if pass(&near, &far, most) {
                        cuts.store(true, Ordering::Release);
                    }
                });
            }
        });
        Self { address, has_cut }
    }
}

/// Passes all on, or so many bytes at most: then both are cut. Whether they were.
fn pass(mut from: &TcpStream, mut to: &TcpStream, most: Option<usize>) -> bool {
    let mut buffer = vec![0; 65_536];
    let mut left = most.unwrap_or(usize::MAX);
    while left > 0 {
        let Ok(length) = from.read(&mut buffer) else { break };
        if length == 0 {
            let _ = to.shutdown(Shutdown::Write);
            return false;
        }
        let length = length.min(left);
        left -= length;
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
    left == 0
}

#[test]
fn one_lost_connection_of_several_fails_the_migration_and_the_source_runs() {
    let (mut lost, mut attempts) = (0, 0);
    while lost < 3 {
        attempts += 1;
        assert!(attempts < 100, "connection {lost} hardly carries anything");
        let (source, target) = pair();
        let receiver = target.receive("", &[]);
        let relay = Relay::before(&receiver.address, move |_, number| (number == lost).then_some(20_000));
        let ended = source.migrate("", "db1", &relay.address);
        // The stand-in's memory has a million bytes; which of four connections carries how much of it is up to the system.
        if !relay.has_cut.load(Ordering::Acquire) {
            ended.expect(EXIT_MIGRATED, "migrated");
            runs_only_at(&target, &source);
            continue;
        }
        lost += 1;
        let ended = ended.expect(EXIT_FAILED, "failed");
        assert!(ended.summary["error"].as_str().is_some(), "{:#}", ended.summary);
        wait_until("the target's end", || target.domains().is_empty());
        runs_only_at(&source, &target);
        // A second attempt works at once.
        source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
        runs_only_at(&target, &source);
    }
}

/// A receiver of a release that knows nothing of blocks: it reads what it knows, and answers without them.
#[test]
fn a_target_without_blocks_gets_the_stream_as_it_is_and_it_is_said() {
    let (source, target) = pair();
    let receiver = target.receive("", &[]);
    let older = Older::before(&receiver.address);
    let ended = source.migrate("", "db1", &older.address).expect(EXIT_MIGRATED, "migrated");
    assert!(ended.stderr.contains("over one connection, as it is"), "{}", ended.stderr);
    assert_eq!(ended.summary["stream"], serde_json::Value::Null);
    runs_only_at(&target, &source);
}

/// Takes the offer of blocks out of what the source says, as a release does that does not read it.
struct Older {
    address: String,
}

impl Older {
    fn before(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let target = target.to_owned();
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(&target) else { return };
                let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                std::thread::spawn(move || pass(&back_from, &back_to, None));
                std::thread::spawn(move || {
                    let mut lines = BufReader::new(near.try_clone().unwrap());
                    let mut greeting = String::new();
                    lines.read_line(&mut greeting).unwrap();
                    (&far).write_all(greeting.as_bytes()).unwrap();
                    if greeting.contains("\"control\"") {
                        let mut start = String::new();
                        lines.read_line(&mut start).unwrap();
                        let mut said: serde_json::Value = serde_json::from_str(&start).unwrap();
                        if let Some(start) = said.get_mut("start").and_then(serde_json::Value::as_object_mut)
                        {
                            assert!(start.remove("blocks").is_some());
                        }
                        (&far).write_all(format!("{said}\n").as_bytes()).unwrap();
                    }
                    (&far).write_all(lines.buffer()).unwrap();
                    pass(&near, &far, None);
                });
            }
        });
        Self { address }
    }
}
