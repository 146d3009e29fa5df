//! Both filters against each other: a made-up save on one end, a model of libxenguest's restore on the other.

mod chaos;
mod examples;
mod failures;
mod faults;
mod guest_stream;
mod interleavings;
mod journey;
mod late_side;
mod left_out;
mod pair;
mod seen;
mod storage;
