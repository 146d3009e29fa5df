//! How dom0 finds the lists and asks for them: nodes, requests, signals, and another host.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a test says what it holds by its name, and ends where it cannot go on"
)]

mod fake;

use std::collections::BTreeMap;

use enlightenment::device::{Publish, Request};
use enlightenment::xenstore::{self, RequestKind, parse_answer, parse_number};
use fake::{ARGUMENT, Machine};
use kernel_module::{Errno, Module};

fn node(machine: &Machine, name: &str) -> String {
    machine.fake.xenstore.get(name).cloned().unwrap_or_default()
}

fn number(machine: &Machine, name: &str) -> u64 {
    parse_number(node(machine, name).as_bytes()).unwrap()
}

fn ask(machine: &mut Machine, request: &str) {
    machine.fake.xenstore.insert(xenstore::REQUEST.to_owned(), request.to_owned());
    machine.module.watch_fired(&mut machine.fake);
}

fn take(machine: &mut Machine) -> Result<Request, Errno> {
    machine.module.read(&mut machine.fake, ARGUMENT, 16)?;
    let bytes = &machine.fake.user[&ARGUMENT];
    Ok(Request {
        sequence: u64::from_le_bytes(bytes[0..8].try_into().unwrap()),
        kind: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
        reserved: u32::from_le_bytes(bytes[12..16].try_into().unwrap()),
    })
}

fn request(sequence: u64, kind: RequestKind) -> Request {
    Request { sequence, kind: kind as u32, reserved: 0 }
}

#[test]
fn all_nodes_are_written_at_start_and_gone_at_the_end() {
    let mut machine = Machine::new(true);
    let root = machine.stats().root_pfn;
    assert_eq!(number(&machine, xenstore::VERSION), u64::from(enlightenment::ABI_VERSION));
    assert_eq!(number(&machine, xenstore::ROOT_PFN), root);
    assert_eq!(number(&machine, xenstore::GENERATION), 0);
    assert_eq!(parse_answer(node(&machine, xenstore::ANSWER).as_bytes()), Some((0, 0)));
    assert_eq!(machine.fake.xenstore.get(xenstore::REQUEST), Some(&String::new()));
    let port = number(&machine, xenstore::EVENT_CHANNEL) as u32;
    assert!(machine.fake.ports.contains(&port));
    assert_eq!(machine.stats().xen, 1);
    machine.fake.root = None;
    machine.module.stop(&mut machine.fake);
    assert!(machine.fake.xenstore.is_empty() && machine.fake.ports.is_empty());
    assert_eq!(machine.fake.pages_held(), 0);
}

#[test]
fn off_xen_there_is_neither_node_nor_signal() {
    let mut machine = Machine::new(false);
    machine.module.watch_fired(&mut machine.fake);
    let generation = machine.begin();
    machine.publish(generation, Vec::new());
    machine.withdraw();
    assert!(machine.fake.xenstore.is_empty() && machine.fake.ports.is_empty());
    assert!(machine.fake.signals.is_empty());
    assert_eq!((machine.stats().xen, machine.stats().signals), (0, 0));
    machine.stop();
}

#[test]
fn a_publication_is_told_and_answers_its_request() {
    let mut machine = Machine::new(true);
    let port = number(&machine, xenstore::EVENT_CHANNEL) as u32;
    let first = machine.begin();
    machine.publish(first, Vec::new());
    assert_eq!(number(&machine, xenstore::GENERATION), first);
    assert_eq!(parse_answer(node(&machine, xenstore::ANSWER).as_bytes()), Some((0, 0)));
    let second = machine.begin();
    machine.fake.published.insert(second, Vec::new());
    machine.publish_as(Publish { generation: second, answers: u64::MAX, ..Publish::default() }).unwrap();
    assert_eq!(node(&machine, xenstore::ANSWER), format!("{} {second}", u64::MAX));
    assert_eq!(machine.fake.signals, [port, port]);
    machine.withdraw();
    assert_eq!(number(&machine, xenstore::GENERATION), 0);
    assert_eq!(machine.stats().signals, 3);
    machine.stop();
}

#[test]
fn requests_come_in_order_and_each_once() {
    let mut machine = Machine::new(true);
    machine.module.watch_fired(&mut machine.fake);
    assert!(!machine.module.has_request());
    ask(&mut machine, "1 snapshot");
    machine.module.watch_fired(&mut machine.fake);
    ask(&mut machine, "1 begun");
    ask(&mut machine, "1 ended");
    assert_eq!(take(&mut machine), Ok(request(1, RequestKind::Snapshot)));
    assert_eq!(take(&mut machine), Ok(request(1, RequestKind::Begun)));
    assert!(machine.module.has_request());
    assert_eq!(take(&mut machine), Ok(request(1, RequestKind::Ended)));
    assert_eq!(take(&mut machine), Err(Errno::EAGAIN));
    assert_eq!(machine.stats().requests, 3);
    // The same words again, after they were read, are a new request: dom0 may begin its numbers anew.
    ask(&mut machine, "1 snapshot");
    assert_eq!(take(&mut machine), Ok(request(1, RequestKind::Snapshot)));
    machine.stop();
}

#[test]
fn what_is_no_request_is_left_alone() {
    let mut machine = Machine::new(true);
    let long = format!("1 {}", "snapshot".repeat(100));
    for value in
        ["", " ", "snapshot", "1", "1 ", "1 nothing", "x snapshot", "1  snapshot", "-1 snapshot", &long]
    {
        ask(&mut machine, value);
        assert!(!machine.module.has_request(), "{value:?}");
    }
    machine.stop();
}

#[test]
fn of_many_requests_the_newest_are_kept() {
    let mut machine = Machine::new(true);
    for sequence in 0..20 {
        ask(&mut machine, &format!("{sequence} snapshot"));
    }
    for sequence in 12..20 {
        assert_eq!(take(&mut machine), Ok(request(sequence, RequestKind::Snapshot)));
    }
    assert!(!machine.module.has_request());
    machine.stop();
}

#[test]
fn a_request_that_could_not_be_handed_over_still_waits() {
    let mut machine = Machine::new(true);
    ask(&mut machine, "7 snapshot");
    assert_eq!(machine.module.read(&mut machine.fake, 1, 16), Err(Errno::EFAULT));
    assert_eq!(machine.module.read(&mut machine.fake, ARGUMENT, 15), Err(Errno::EINVAL));
    assert_eq!(take(&mut machine), Ok(request(7, RequestKind::Snapshot)));
    machine.stop();
}

#[test]
fn on_another_host_everything_is_announced_anew_and_nobody_s_port_is_closed() {
    let mut machine = Machine::new(true);
    let generation = machine.begin();
    machine.publish(generation, Vec::new());
    let old = number(&machine, xenstore::EVENT_CHANNEL) as u32;
    let root = number(&machine, xenstore::ROOT_PFN);
    // A new xenstore, and the old port is someone else's now: `Fake` panics if that is closed.
    machine.fake.xenstore = BTreeMap::new();
    machine.fake.ports.clear();
    machine.module.watch_fired(&mut machine.fake);
    let new = number(&machine, xenstore::EVENT_CHANNEL) as u32;
    assert_ne!(new, old);
    assert!(machine.fake.ports.contains(&new));
    assert_eq!(number(&machine, xenstore::ROOT_PFN), root);
    assert_eq!(number(&machine, xenstore::GENERATION), generation);
    assert_eq!(parse_answer(node(&machine, xenstore::ANSWER).as_bytes()), Some((0, generation)));
    assert_eq!(machine.fake.xenstore.get(xenstore::REQUEST), Some(&String::new()));
    // Once is enough.
    machine.module.watch_fired(&mut machine.fake);
    assert_eq!(number(&machine, xenstore::EVENT_CHANNEL) as u32, new);
    let next = machine.begin();
    machine.publish(next, Vec::new());
    assert_eq!(machine.fake.signals, [old, new]);
    machine.stop();
}

#[test]
fn unloading_on_another_host_before_the_watch_fires_closes_nothing() {
    let mut machine = Machine::new(true);
    machine.fake.xenstore = BTreeMap::new();
    machine.fake.ports.clear();
    machine.stop();
}

#[test]
fn a_request_that_was_there_first_is_not_overwritten() {
    let mut machine = Machine { fake: fake::Fake::new(), module: Module::new() };
    machine.fake.put(ARGUMENT, &[0; 256]);
    machine.fake.xenstore.insert(xenstore::REQUEST.to_owned(), "3 snapshot".to_owned());
    machine.module.start(&mut machine.fake, true).unwrap();
    machine.module.watch_fired(&mut machine.fake);
    assert_eq!(take(&mut machine), Ok(request(3, RequestKind::Snapshot)));
    machine.stop();
}

#[test]
fn without_xenstore_or_port_the_device_still_works() {
    for (xenstore_fails, no_ports) in [(true, false), (false, true)] {
        let mut machine = Machine { fake: fake::Fake::new(), module: Module::new() };
        machine.fake.put(ARGUMENT, &[0; 256]);
        machine.fake.xenstore_fails = xenstore_fails;
        machine.fake.no_ports = no_ports;
        machine.module.start(&mut machine.fake, true).unwrap();
        assert!(!machine.module.is_announced());
        assert_eq!(machine.stats().xen, 0);
        let generation = machine.begin();
        machine.publish(generation, Vec::new());
        assert!(machine.fake.signals.is_empty() && machine.fake.ports.is_empty());
        // It is tried again when the watch fires.
        machine.fake.xenstore_fails = false;
        machine.fake.no_ports = false;
        machine.module.watch_fired(&mut machine.fake);
        assert_eq!((machine.stats().xen, machine.fake.ports.len()), (1, 1));
        assert_eq!(number(&machine, xenstore::GENERATION), generation);
        machine.stop();
    }
}

#[test]
fn while_a_migration_goes_on_dom0_hears_only_what_it_asked_for() {
    let mut machine = Machine::new(true);
    let publish = |machine: &mut Machine, answers| {
        let generation = machine.begin();
        machine.fake.published.insert(generation, Vec::new());
        machine.publish_as(Publish { generation, answers, ..Publish::default() }).unwrap();
        generation
    };
    ask(&mut machine, "1 snapshot");
    publish(&mut machine, 1);
    ask(&mut machine, "2 begun");
    let begun = machine.stats();
    assert_eq!((begun.migrating, begun.signals, begun.untold), (1, 1, 0));
    let nodes = machine.fake.xenstore.clone();
    for _ in 0..100 {
        publish(&mut machine, 0);
    }
    machine.withdraw();
    let newest = publish(&mut machine, 0);
    let during = machine.stats();
    assert_eq!((during.signals, during.untold), (1, 102), "{during:?}");
    assert_eq!(during.calls, begun.calls + 203);
    assert_eq!(machine.fake.xenstore, nodes, "no node is written");
    // One who asks is answered, all the same.
    ask(&mut machine, "3 snapshot");
    let answer = publish(&mut machine, 3);
    assert_eq!(machine.stats().signals, 2);
    assert_eq!(parse_answer(node(&machine, xenstore::ANSWER).as_bytes()), Some((3, answer)));
    assert!(answer > newest);
    let last = publish(&mut machine, 0);
    // At the end dom0 hears once of the newest.
    ask(&mut machine, "4 ended");
    let ended = machine.stats();
    assert_eq!((ended.migrating, ended.signals, ended.untold), (0, 3, 103));
    assert_eq!(number(&machine, xenstore::GENERATION), last);
    publish(&mut machine, 0);
    assert_eq!(machine.stats().signals, 4);
    // And nothing to hear of is nothing heard.
    ask(&mut machine, "5 begun");
    ask(&mut machine, "6 ended");
    assert_eq!(machine.stats().signals, 4);
    machine.stop();
}

#[test]
fn a_guest_that_has_arrived_is_not_migrating_any_more() {
    let mut machine = Machine::new(true);
    ask(&mut machine, "2 begun");
    let generation = machine.begin();
    machine.publish(generation, Vec::new());
    assert_eq!(machine.stats().untold, 1);
    machine.fake.xenstore = BTreeMap::new();
    machine.fake.ports.clear();
    machine.module.watch_fired(&mut machine.fake);
    assert_eq!(machine.stats().migrating, 0);
    assert_eq!(number(&machine, xenstore::GENERATION), generation);
    let next = machine.begin();
    machine.publish(next, Vec::new());
    assert_eq!(machine.stats().signals, 1);
    machine.stop();
}

#[test]
fn forgotten_requests_are_counted() {
    let mut machine = Machine::new(true);
    for sequence in 1..=20 {
        ask(&mut machine, &format!("{sequence} snapshot"));
    }
    let stats = machine.stats();
    assert_eq!((stats.requests, stats.requests_forgotten), (20, 12));
    machine.stop();
}
