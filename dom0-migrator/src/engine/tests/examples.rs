//! The examples in `docs/stream.md` are what the code writes and reads.

use crate::engine::LateWrites;
use crate::engine::memory_record::{self, Builder, PrivateRecord, SpanKind};
use crate::engine::xen_stream::{Entry, NOTAB, PAGE};

/// The octets of the example with this name.
fn example(name: &str) -> Vec<u8> {
    let text = include_str!("../../../../docs/stream.md");
    let (_, rest) = text.split_once(&format!("```hex {name}\n")).expect("an example of that name");
    let (block, _) = rest.split_once("```").expect("its end");
    block.split_whitespace().map(|octet| u8::from_str_radix(octet, 16).unwrap()).collect()
}

#[test]
fn memory() {
    let mut builder = Builder::default();
    for (index, pfn) in (0x10..0x13).enumerate() {
        let offset = 0x4000 + (index * PAGE) as u64;
        builder.push(Entry { pfn, page_type: NOTAB }, SpanKind::Reference { disk: 0, offset });
        builder.hashes.push([0xa0 + index as u8; 16]);
    }
    for pfn in 0x13..0x15 {
        builder.push(Entry { pfn, page_type: NOTAB }, SpanKind::Zero);
    }
    let mut body = Vec::new();
    builder.write_head(7, &mut body);
    assert_eq!(body, example("memory"));
    let Ok(PrivateRecord::Memory(parsed)) = PrivateRecord::parse(&body) else { panic!("it does not parse") };
    assert_eq!((parsed.first_reference, parsed.spans().count(), parsed.references()), (7, 2, 3));
}

#[test]
fn sync() {
    assert_eq!(memory_record::sync_body(5).as_slice(), example("sync"));
    assert!(matches!(PrivateRecord::parse(&example("sync")), Ok(PrivateRecord::Sync(5))));
}

#[test]
fn late_writes() {
    let bodies: Vec<_> = LateWrites::new(vec![7, 8]).bodies().collect();
    assert_eq!(bodies, [example("late writes")]);
}
