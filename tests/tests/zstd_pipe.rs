//! The compressing transport carries both directions whole, at once, and counts them.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

const PROGRAM: &str = env!("CARGO_BIN_EXE_zstd-pipe");

#[test]
fn both_directions_arrive_whole_at_once_and_compressed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let json = dir.path().join("carried.json");
    let mut receiver =
        Command::new(PROGRAM).args(["receive", "127.0.0.1:0", "cat"]).stderr(Stdio::piped()).spawn()?;
    let mut words = String::new();
    BufReader::new(receiver.stderr.take().context("no stderr")?).read_line(&mut words)?;
    let address = words.trim().strip_prefix("ready on ").context("no address")?.to_owned();
    let mut sender = Command::new(PROGRAM)
        .args(["send", &address, "--json"])
        .arg(&json)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut to = sender.stdin.take().context("no stdin")?;
    let mut from = sender.stdout.take().context("no stdout")?;

    // A question is answered before anything more is sent, as xl's first messages are.
    let mut answer = [0; 5];
    to.write_all(b"hello")?;
    from.read_exact(&mut answer)?;
    ensure!(&answer == b"hello", "{answer:?}");

    // Half noise, half zeros: 4 MiB.
    let mut rng = fastrand::Rng::with_seed(1);
    let mut sent = vec![0; 4 << 20];
    rng.fill(&mut sent[..2 << 20]);
    let expected = sent.clone();
    let writing = std::thread::spawn(move || to.write_all(&sent));
    let mut back = Vec::new();
    from.read_to_end(&mut back)?;
    writing.join().map_err(|_| anyhow::anyhow!("panicked"))??;
    ensure!(back == expected, "{} bytes came back, or others", back.len());
    ensure!(sender.wait()?.success() && receiver.wait()?.success(), "an end failed");

    let carried: serde_json::Value = serde_json::from_slice(&std::fs::read(&json)?)?;
    let number = |name: &str| carried[name].as_u64().context("a number is missing");
    let plain = (4 << 20) + 5;
    ensure!((number("plain_sent")?, number("plain_received")?) == (plain, plain), "{carried}");
    for wire in ["wire_sent", "wire_received"] {
        ensure!((2 << 20..3 << 20).contains(&number(wire)?), "{carried}");
    }
    Ok(())
}
