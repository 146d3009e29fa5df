//! What is found out about a build, against a real mysqld under load: it must be what the catalogue says, and any other entry must be
//! refused.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, bail, ensure};
use guest_probe::catalogue::{Build, Catalogue};
use guest_probe::derive::{self, Derivation};
use guest_probe::doctor::{self, DoctorError, Subject};
use guest_probe::left_out::LeftOut;
use guest_probe::process::MysqldProcess;
use tests::server::{Server, wait_for};

fn known(process: &MysqldProcess) -> Result<Build> {
    let exe = process.exe()?;
    let id = guest_probe::elf::Elf::parse(&exe)?.build_id()?;
    Ok(Catalogue::built_in()?.find(&id)?.clone())
}

/// Derives until nothing is missing: what is found out depends on what the load has done so far.
fn derive_under_load(process: &MysqldProcess) -> Result<Derivation> {
    let mut last = None;
    let derived = wait_for("a derivation that lacks nothing", || {
        let derivation = derive::derive(process)?;
        let whole = derivation.build.is_some();
        last = Some(derivation);
        Ok(whole)
    });
    let last = last.context("nothing was derived")?;
    if let Err(error) = derived {
        bail!("{error}: {:#?}", last.missing());
    }
    Ok(last)
}

#[test]
fn a_build_without_an_entry_is_derived_as_the_catalogue_has_it() -> Result<()> {
    let server = Server::start(&[])?;
    let _load = server.load(2)?;
    let process = MysqldProcess::find(Some(server.pid()))?;
    let known = known(&process)?;
    let derivation = derive_under_load(&process)?;
    let derived = derivation.build.clone().context("no entry")?;
    ensure!(Build { package: known.package.clone(), ..derived.clone() } == known, "{derived:#?}");
    let agreement = derivation.agreement.as_ref().context("no agreement")?;
    println!("{agreement:?}");
    ensure!(agreement.contradict == 0 && agreement.compared > 100, "{agreement:?}");

    // Through the doctor, with a catalogue that has no entry for it: an entry is made, and makes the build known.
    let none = Catalogue::parse("")?;
    let device = std::path::Path::new("/nonexistent");
    // Each look sees what the load has left in the pool at that moment, so each may lack something.
    let subject = Subject::Process(Some(server.pid()));
    wait_for("the doctor to find all that it needs", || {
        let report = doctor::look(&subject, &none, device)?;
        ensure!(report.package.is_none() && !report.missing_here.is_empty(), "there is no device");
        let listed = report.lists.is_some_and(|lists| lists.frames_read + lists.frames_written > 1000);
        ensure!(listed == report.missing.is_empty(), "{:?}", report.missing);
        Ok(listed)
    })?;
    let mut made = None;
    wait_for("an entry", || {
        made = match doctor::make_entry(&subject) {
            Err(DoctorError::NotSure(_)) => None,
            entry => Some(entry?),
        };
        Ok(made.is_some())
    })?;
    let made = made.context("no entry")?;
    let with_own = Catalogue::parse(&made.to_toml()?)?;
    let report = doctor::look(&subject, &with_own, device)?;
    ensure!(report.package.is_some() && report.missing.is_empty(), "{:?}", report.missing);
    for file in report.files.iter().filter(|file| file.file.contains("sbtest")) {
        ensure!(file.bytes_mapped > 10 << 20 && file.left_out.is_none(), "{file:?}");
    }
    ensure!(report.files.iter().any(|file| file.left_out == Some(LeftOut::Temporary)));

    // Every field that is wrong on purpose is refused: by what is found out, and where it leads elsewhere by the control blocks alone.
    ensure!(derivation.contradictions(&known).is_empty(), "{:?}", derivation.contradictions(&known));
    ensure!(derive::agreement(&process, &known)?.doubts().is_empty());
    for (name, wrong) in wrong_entries(&known) {
        ensure!(!derivation.contradictions(&wrong).is_empty(), "a wrong {name} contradicts nothing");
        if ["block.frame", "block.page_id", "block.oldest", "block.space", "block.state", "space.id"]
            .contains(&name)
        {
            let passes = derive::agreement(&process, &wrong).is_ok_and(|found| found.doubts().is_empty());
            ensure!(!passes, "a wrong {name} passes all control blocks");
        }
    }
    Ok(())
}

/// Entries that are wrong in one field each.
fn wrong_entries(known: &Build) -> Vec<(&'static str, Build)> {
    type Change = fn(&mut Build);
    let changes: [(&str, Change); 23] = [
        ("pool.size", |build| build.pool.size += 8),
        ("pool.chunk_count", |build| build.pool.chunk_count += 8),
        ("pool.chunks", |build| build.pool.chunks -= 8),
        ("chunk.size", |build| build.chunk.size += 8),
        ("chunk.block_count", |build| build.chunk.block_count += 8),
        ("chunk.blocks", |build| build.chunk.blocks -= 8),
        ("block.size", |build| build.block.size += 8),
        ("block.page_id", |build| build.block.page_id += 4),
        ("block.page_size", |build| build.block.page_size += 8),
        ("block.fix_count", |build| build.block.fix_count += 8),
        ("block.io_fix", |build| build.block.io_fix += 2),
        ("block.state", |build| build.block.state += 1),
        ("block.newest", |build| build.block.newest += 8),
        ("block.oldest", |build| build.block.oldest += 8),
        ("block.space", |build| build.block.space += 8),
        ("block.version", |build| build.block.version += 4),
        ("block.frame", |build| build.block.frame += 8),
        ("space.id", |build| build.space.id += 8),
        ("space.version", |build| build.space.version += 4),
        ("space.deleted", |build| build.space.deleted += 1),
        ("space.flags", |build| build.space.flags += 4),
        ("node.space", |build| build.node.space += 8),
        ("page_clean", |build| build.functions.page_clean = build.functions.page_dirty.clone()),
    ];
    changes
        .into_iter()
        .map(|(name, change)| {
            let mut build = known.clone();
            change(&mut build);
            (name, build)
        })
        .collect()
}

#[test]
fn several_pool_instances_say_how_far_apart_they_lie() -> Result<()> {
    // A pool of several instances has 1 GiB at least; most of it stays untouched.
    let server = Server::start(&["--innodb-buffer-pool-size=1G", "--innodb-buffer-pool-instances=2"])?;
    let process = MysqldProcess::find(Some(server.pid()))?;
    let known = known(&process)?;
    let derivation = derive::derive(&process)?;
    let size = derivation.fields.get("pool.size").context("no finding")?;
    println!("{size:?}");
    ensure!(size.value == Some(known.pool.size) && size.witnesses.len() == 2, "{size:?}");
    ensure!(derive::agreement(&process, &known)?.contradict == 0);
    // Fresh from its start the server has changed nothing: that is said, and no entry is made.
    ensure!(derivation.build.is_none() && !derivation.missing().is_empty());
    println!("missing: {:#?}", derivation.missing());

    // A server that ends while it is looked at: each look ends with a result or with an error, and the last with an error.
    let mut server = server;
    let killed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looks = scope.spawn(|| {
            let mut looks = 0;
            loop {
                let was_killed = killed.load(Ordering::Acquire);
                let looked = derive::derive(&process).map(|_| ());
                let held = derive::agreement(&process, &known).map(|_| ());
                looks += 1;
                if was_killed {
                    return (looks, looked, held);
                }
            }
        });
        server.kill()?;
        killed.store(true, Ordering::Release);
        let (looks, looked, held) = looks.join().map_err(|_| anyhow!("a look has panicked"))?;
        println!("{looks} looks, at the end: {looked:?}, {held:?}");
        ensure!(looked.is_err() && held.is_err(), "there is no process any more");
        Ok(())
    })
}
