//! Both filters against each other.
