//! Every input of the corpus on its target, and inputs a little other than those.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fastrand::Rng;
use fuzz::{Counting, TARGETS, Target, corpus, seeds, shake};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Inputs that are tried of each target, fewer where one takes a whole migration.
const SHAKEN: u32 = 500;
const SHAKEN_MIGRATIONS: u32 = 30;

/// All that is kept of a target.
fn kept(target: &Target) -> Vec<Vec<u8>> {
    let mut inputs = seeds::of(target.name);
    inputs.extend(corpus::inputs(target.name).unwrap().into_iter().map(|(_, bytes)| bytes));
    inputs
}

#[test]
fn every_input_that_was_kept_does_no_harm() {
    for target in TARGETS {
        let inputs = corpus::inputs(target.name).unwrap();
        assert!(!inputs.is_empty(), "{} has no corpus", target.name);
        for (path, bytes) in inputs {
            // Its name, should it fail; the test harness shows it then.
            println!("{}", path.display());
            target.run(&bytes);
        }
        for bytes in [vec![], vec![0], vec![0xff; 64]].iter().chain(&seeds::of(target.name)) {
            target.run(bytes);
        }
    }
}

/// `POOLSKIP_SHAKE_SEED` repeats a run; what fails is kept beside the other temporary files.
#[test]
fn inputs_that_are_a_little_other_do_no_harm() {
    let seed = std::env::var("POOLSKIP_SHAKE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("POOLSKIP_SHAKE_SEED={seed}");
    let mut random = Rng::with_seed(seed);
    for target in TARGETS {
        let inputs = kept(target);
        for _ in 0..if target.is_a_migration() { SHAKEN_MIGRATIONS } else { SHAKEN } {
            let bytes = shake::shaken(&inputs, target.longest, &mut random);
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target.run(&bytes))) {
                let path = std::env::temp_dir().join(format!("poolskip-found-{}", target.name));
                fs::write(&path, &bytes).unwrap();
                println!("keep {} as tests/fuzz/corpus/{}/found-WHAT", path.display(), target.name);
                std::panic::resume_unwind(panic);
            }
        }
    }
}

#[test]
fn every_corpus_has_its_target_and_is_small() {
    let root = corpus::directory("");
    let found: BTreeSet<String> =
        fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let named: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    assert_eq!(found, named);
    let mut bytes = 0;
    for target in TARGETS {
        bytes += corpus::inputs(target.name).unwrap().iter().map(|(_, input)| input.len()).sum::<usize>();
    }
    assert!(bytes <= 1 << 20, "the corpora have {bytes} bytes in all");
}
