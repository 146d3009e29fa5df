//! Two bundles against each other over connections that stall, split what passes, and are cut.

use super::*;
use proptest::prelude::*;
use std::time::Duration;

/// What one connection does to what passes over it.
#[derive(Clone, Copy, Debug)]
struct Road {
    seed: u64,
    /// Stops for so many milliseconds now and then.
    stall_ms: u64,
    /// Is cut after so many bytes from near to far.
    cut_after: Option<usize>,
}

fn pair() -> (TcpStream, TcpStream) {
    let (a, b) = UnixStream::pair().unwrap();
    (TcpStream::from(OwnedFd::from(a)), TcpStream::from(OwnedFd::from(b)))
}

/// Passes bytes on in pieces of all sizes.
fn pass(mut from: TcpStream, mut to: TcpStream, road: Road) {
    let mut state = road.seed | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut passed = 0;
    let mut buffer = vec![0; 200_000];
    loop {
        let most = 1 + (random() as usize) % buffer.len();
        let Ok(length) = from.read(&mut buffer[..most]) else { break };
        if length == 0 {
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
        if road.stall_ms > 0 && random() % 4 == 0 {
            std::thread::sleep(Duration::from_millis(random() % road.stall_ms));
        }
        let length = road.cut_after.map_or(length, |cut| length.min(cut.saturating_sub(passed)));
        if to.write_all(&buffer[..length]).is_err()
            || road.cut_after.is_some_and(|cut| passed + length >= cut)
        {
            break;
        }
        passed += length;
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// Two bundles over such roads: near socket and bundle, far socket and bundle.
fn bundles(roads: &[Road], compression: Compression) -> [(TcpStream, Bundle); 2] {
    let (mut near, mut far) = (Vec::new(), Vec::new());
    for &road in roads {
        let (near_end, near_road) = pair();
        let (far_road, far_end) = pair();
        for (from, to, road) in [
            (near_road.try_clone().unwrap(), far_road.try_clone().unwrap(), road),
            (far_road, near_road, Road { cut_after: None, ..road }),
        ] {
            std::thread::spawn(move || pass(from, to, road));
        }
        near.push(Wire::of_socket(near_end));
        far.push(Wire::of_socket(far_end));
    }
    [Bundle::start(near, compression).unwrap(), Bundle::start(far, Compression::Off).unwrap()]
}

/// Bytes that are neither noise nor all alike.
fn bytes(count: usize, seed: u64) -> Vec<u8> {
    (0..count as u64).map(|i| ((i / 97).wrapping_mul(seed | 1) >> 5) as u8).collect()
}

/// Sends, ends, and answers what arrived with a word; what arrived, and whether the word came back.
fn exchange(ends: [(TcpStream, Bundle); 2], sent: &[u8]) -> (Vec<u8>, bool) {
    let [(mut near, near_bundle), (mut far, far_bundle)] = ends;
    let arrived = std::thread::scope(|scope| {
        let mut writer = near.try_clone().unwrap();
        scope.spawn(move || {
            // In pieces, as xl writes; a bundle that has ended is no matter here.
            for piece in sent.chunks(77_777) {
                if writer.write_all(piece).is_err() {
                    return;
                }
            }
            let _ = writer.shutdown(Shutdown::Write);
        });
        let mut arrived = Vec::new();
        let _ = far.read_to_end(&mut arrived);
        let _ = far.write_all(b"word").and_then(|()| far.shutdown(Shutdown::Write));
        let mut word = Vec::new();
        let came = near.read_to_end(&mut word).is_ok() && word == b"word";
        (arrived, came)
    });
    drop((near_bundle, far_bundle));
    arrived
}

#[test]
fn last_words_arrive_though_the_bundle_is_dropped_behind_them() {
    for seed in 1..=100 {
        let roads =
            (0..4).map(|lane| Road { seed: seed * 4 + lane, stall_ms: lane % 2 * 5, cut_after: None });
        let [(mut near, near_bundle), (mut far, far_bundle)] =
            bundles(&roads.collect::<Vec<_>>(), Compression::Off);
        far.write_all(b"last words").unwrap();
        // As a `Wire` goes: its socket first, and others may still have it.
        let still_there = far.try_clone().unwrap();
        drop(far);
        drop(far_bundle);
        let mut word = Vec::new();
        near.read_to_end(&mut word).unwrap();
        assert_eq!(word, b"last words");
        assert!(!near_bundle.shared.has_failed(), "an end in order was taken for a broken connection");
        drop(still_there);
    }
}

fn road() -> impl Strategy<Value = Road> {
    (any::<u64>(), prop_oneof![Just(0_u64), 1_u64..20]).prop_map(|(seed, stall_ms)| Road {
        seed,
        stall_ms,
        cut_after: None,
    })
}

fn compression() -> impl Strategy<Value = Compression> {
    prop_oneof![
        Just(Compression::Off),
        Just(Compression::Lz4),
        Just(Compression::Zstd),
        Just(Compression::Auto)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn everything_arrives_in_order_whatever_the_roads_do(
        roads in proptest::collection::vec(road(), 1..6),
        count in 0_usize..3_000_000,
        compression in compression(),
    ) {
        let sent = bytes(count, roads[0].seed);
        let (arrived, came_back) = exchange(bundles(&roads, compression), &sent);
        prop_assert!(arrived == sent, "{} of {} bytes", arrived.len(), sent.len());
        prop_assert!(came_back);
    }

    #[test]
    fn one_that_is_cut_ends_all_and_leaves_no_gap(
        roads in proptest::collection::vec(road(), 2..6),
        cut in 0_usize..200_000,
        compression in compression(),
    ) {
        let mut roads = roads;
        roads[0].cut_after = Some(cut);
        let sent = bytes(4_000_000, 3);
        let (arrived, came_back) = exchange(bundles(&roads, compression), &sent);
        // A lane may be cut after the last byte that it was to carry; everything else is a beginning of the stream.
        prop_assert!(sent.starts_with(&arrived));
        prop_assert!(!came_back || arrived.len() == sent.len());
        prop_assert!(arrived.len() < sent.len() || cut > 0);
    }

    #[test]
    fn a_peer_that_sends_garbage_gets_nothing_through(garbage in proptest::collection::vec(any::<u8>(), 1..500)) {
        let (near, mut stranger) = pair();
        let (idle, _kept) = pair();
        let (mut socket, bundle) =
            Bundle::start(vec![Wire::of_socket(near), Wire::of_socket(idle)], Compression::Off).unwrap();
        stranger.write_all(&garbage).unwrap();
        stranger.shutdown(Shutdown::Write).unwrap();
        let mut arrived = Vec::new();
        let _ = socket.read_to_end(&mut arrived);
        prop_assert!(arrived.is_empty());
        prop_assert!(bundle.shared.has_failed());
    }
}

/// A connection that stops for good does not stop the others before what may wait for it is full; nor does it take memory.
#[test]
fn a_lane_that_stands_still_holds_back_no_more_than_fits() {
    let lanes: Vec<_> = (0..2).map(|_| pair()).collect();
    let (near, mut far): (Vec<_>, Vec<_>) = lanes.into_iter().unzip();
    let (_socket, bundle) =
        Bundle::start(near.into_iter().map(Wire::of_socket).collect(), Compression::Off).unwrap();
    // The second lane brings blocks 1, 2, …; the first never brings block 0.
    let mut second = far.remove(1);
    second.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut sent = 0;
    for number in 1.. {
        let header = Header::Block { number, codec: Codec::Raw, length: BLOCK_MAX, stored: BLOCK_MAX };
        let block = [&header.to_bytes()[..], &vec![7; BLOCK_MAX]].concat();
        if second.write_all(&block).is_err() {
            break;
        }
        sent = number;
    }
    // What waits, one more in the lane's hands, and what the sockets' buffers hold.
    assert!((order::AHEAD_MAX - 1..order::AHEAD_MAX + 16).contains(&sent), "{sent}");
    assert!(!bundle.shared.has_failed());
}

#[test]
fn connections_that_contradict_each_other_end_all() {
    let block = |number| {
        [&Header::Block { number, codec: Codec::Raw, length: 1, stored: 1 }.to_bytes()[..], b"x"].concat()
    };
    let end = |blocks| Header::End { blocks }.to_bytes().to_vec();
    for (first, second) in [
        // The same block twice, a block behind the end, one that would wait for its turn for good, two ends that differ, and one that goes
        // backwards.
        (block(0), block(0)),
        ([block(0), end(1)].concat(), block(1)),
        ([block(0), end(1)].concat(), block(1000)),
        (end(1), block(1000)),
        (end(3), end(4)),
        ([block(1), block(0)].concat(), Vec::new()),
    ] {
        let lanes: Vec<_> = (0..2).map(|_| pair()).collect();
        let (near, mut far): (Vec<_>, Vec<_>) = lanes.into_iter().unzip();
        let (mut socket, bundle) =
            Bundle::start(near.into_iter().map(Wire::of_socket).collect(), Compression::Off).unwrap();
        far[0].write_all(&first).unwrap();
        far[1].write_all(&second).unwrap();
        let mut arrived = Vec::new();
        let _ = socket.read_to_end(&mut arrived);
        // The stream may have ended in order before the other connection's word came.
        let until = Instant::now() + Duration::from_secs(60);
        while !bundle.shared.has_failed() {
            assert!(Instant::now() < until, "nothing fails");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn what_was_compressed_is_counted_before_and_after() {
    let roads = [Road { seed: 1, stall_ms: 0, cut_after: None }; 2];
    let [near, far] = bundles(&roads, Compression::Zstd);
    let counts = near.1.shared.clone();
    let sent = bytes(1_000_000, 5);
    assert!(exchange([near, far], &sent).0 == sent);
    let (before, after) = (counts.before.load(Ordering::Relaxed), counts.after.load(Ordering::Relaxed));
    assert_eq!(before, 1_000_000);
    assert!(after > 0 && after < before / 4, "{after}");
}
