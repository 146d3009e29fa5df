//! libFuzzer around one target, the one that the environment variable `POOLSKIP_FUZZ_TARGET` names (`cargo xtask fuzz` sets it). When it
//! names `list`, the program says which there are, with the longest input of each and its rooms; `seeds` writes inputs that are right into the
//! directory `POOLSKIP_FUZZ_SEEDS`, one folder for each target.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use fuzz::{Counting, TARGETS, Target, seeds, watchdog};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static CHOSEN: OnceLock<&'static Target> = OnceLock::new();

fn choose() {
    let name = std::env::var("POOLSKIP_FUZZ_TARGET").unwrap_or_default();
    if let Some(target) = TARGETS.iter().find(|target| target.name == name) {
        let _ = CHOSEN.set(target);
        watchdog::start();
        return;
    }
    let done = if name == "seeds" { write_seeds() } else { Ok(()) };
    for target in TARGETS {
        let rooms: Vec<_> = target.rooms().collect();
        println!("{}\t{}\t{}\t{}", target.name, target.longest, rooms.join(","), target.about);
    }
    std::process::exit(i32::from(done.is_err() || !matches!(name.as_str(), "list" | "seeds")));
}

fn write_seeds() -> std::io::Result<()> {
    let root = PathBuf::from(std::env::var_os("POOLSKIP_FUZZ_SEEDS").unwrap_or_default());
    for target in TARGETS {
        let directory = root.join(target.name);
        fs::create_dir_all(&directory)?;
        for (number, bytes) in seeds::of(target.name).iter().enumerate() {
            fs::write(directory.join(format!("seed-{number}")), bytes)?;
        }
    }
    Ok(())
}

libfuzzer_sys::fuzz_target!(
    init: choose(),
    |data: &[u8]| {
        if let Some(target) = CHOSEN.get() {
            watchdog::watched(|| target.run(data));
        }
    }
);
