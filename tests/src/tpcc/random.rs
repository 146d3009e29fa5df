//! Random values as the standard draws them (2.1.5, 2.1.6, 4.3.2).

use fastrand::Rng;

/// Syllables of last names (4.3.2.3).
const SYLLABLES: [&str; 10] =
    ["BAR", "OUGHT", "ABLE", "PRI", "PRES", "ESE", "ANTI", "CALLY", "ATION", "EING"];

/// Names that the syllables give: three digits.
pub const LAST_NAMES: u32 = 1000;

/// The constants C of NURand (2.1.6), one for each field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Constants {
    /// For C_LAST: of 0 to 255.
    pub last_name: u32,
    /// For C_ID: of 0 to 1023.
    pub customer: u32,
    /// For OL_I_ID: of 0 to 8191.
    pub item: u32,
}

/// Range of A for C_LAST.
const A_LAST_NAME: u32 = 255;
/// Range of A for C_ID.
const A_CUSTOMER: u32 = 1023;
/// Range of A for OL_I_ID.
const A_ITEM: u32 = 8191;

impl Constants {
    /// Those that the tables are loaded with.
    pub fn for_load(rng: &mut Rng) -> Self {
        Self {
            last_name: rng.u32(0..=A_LAST_NAME),
            customer: rng.u32(0..=A_CUSTOMER),
            item: rng.u32(0..=A_ITEM),
        }
    }

    /// Those of a run, given the one that C_LAST was loaded with: the two must differ by 65 to 119, but by neither 96 nor 112 (2.1.6.1).
    pub fn for_run(rng: &mut Rng, loaded_last_name: u32) -> Self {
        let allowed: Vec<u32> = (0..=A_LAST_NAME)
            .filter(|run| {
                let delta = run.abs_diff(loaded_last_name);
                (65..=119).contains(&delta) && delta != 96 && delta != 112
            })
            .collect();
        // Whatever was loaded (0 to 255), one side of it has at least 65 values.
        let last_name = rng.choice(allowed).unwrap_or_default();
        Self { last_name, ..Self::for_load(rng) }
    }
}

/// A terminal's or loader's source of values.
#[derive(Clone, Debug)]
pub struct Random {
    rng: Rng,
    constants: Constants,
}

impl Random {
    /// With constants for NURand and a seed of its own.
    pub fn new(seed: u64, constants: Constants) -> Self {
        Self { rng: Rng::with_seed(seed), constants }
    }

    /// The generator beneath.
    pub fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    /// Uniform in `low..=high`.
    pub fn uniform(&mut self, low: u32, high: u32) -> u32 {
        self.rng.u32(low..=high)
    }

    /// Whether something that happens in `percent` of all cases does.
    pub fn percent(&mut self, percent: u32) -> bool {
        self.rng.u32(1..=100) <= percent
    }

    /// A customer's number of 1 to `customers`.
    pub fn customer(&mut self, customers: u32) -> u32 {
        self.non_uniform(shrunk(A_CUSTOMER, customers, 3000), self.constants.customer, 1, customers)
    }

    /// An item's number of 1 to `items`.
    pub fn item(&mut self, items: u32) -> u32 {
        self.non_uniform(shrunk(A_ITEM, items, 100_000), self.constants.item, 1, items)
    }

    /// A last name of the first `names`, which a small scale has fewer of than [`LAST_NAMES`].
    pub fn last_name(&mut self, names: u32) -> String {
        let names = names.min(LAST_NAMES);
        let number = self.non_uniform(
            shrunk(A_LAST_NAME, names, LAST_NAMES),
            self.constants.last_name,
            0,
            names.saturating_sub(1),
        );
        last_name(number)
    }

    /// NURand(A, x, y) of 2.1.6.
    fn non_uniform(&mut self, a: u32, c: u32, x: u32, y: u32) -> u32 {
        let drawn = self.uniform(0, a) | self.uniform(x, y);
        (drawn + c) % (y - x + 1) + x
    }

    /// A string of letters and digits, `low..=high` long.
    pub fn text(&mut self, low: usize, high: usize) -> String {
        let length = self.rng.usize(low..=high);
        (0..length).map(|_| self.rng.alphanumeric()).collect()
    }

    /// A string of digits.
    pub fn digits(&mut self, length: usize) -> String {
        (0..length).map(|_| self.rng.digit(10)).collect()
    }

    /// 26 to 50 characters, of which one in ten has "ORIGINAL" somewhere in it (4.3.3.1).
    pub fn data(&mut self) -> String {
        let mut text = self.text(26, 50);
        if self.percent(10) {
            let from = self.rng.usize(0..=text.len() - 8);
            text.replace_range(from..from + 8, "ORIGINAL");
        }
        text
    }

    /// Cents as a decimal number of the server's.
    pub fn money(&mut self, low_cents: u32, high_cents: u32) -> String {
        money(i64::from(self.uniform(low_cents, high_cents)))
    }
}

/// A in proportion to a range that was made smaller, still one less than a power of two, for NURand's "or" needs that.
fn shrunk(a: u32, range: u32, standard: u32) -> u32 {
    let mut shrunk = a;
    while shrunk > 1 && u64::from(shrunk) * u64::from(standard) > u64::from(a) * u64::from(range) {
        shrunk >>= 1;
    }
    shrunk
}

/// The name of a number below 1000.
pub fn last_name(number: u32) -> String {
    let syllable = |place: u32| SYLLABLES[(number / place % 10) as usize];
    [100, 10, 1].map(syllable).concat()
}

/// Cents as a decimal number.
pub fn money(cents: i64) -> String {
    let sign = if cents < 0 { "-" } else { "" };
    format!("{sign}{}.{:02}", cents.abs() / 100, cents.abs() % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_names_are_those_of_the_standard_s_example() {
        assert_eq!(last_name(371), "PRICALLYOUGHT");
        assert_eq!(last_name(40), "BARPRESBAR");
    }

    #[test]
    fn the_constants_of_load_and_run_differ_as_they_must_whatever_was_loaded() {
        let mut rng = Rng::with_seed(1);
        for loaded in 0..=A_LAST_NAME {
            for _ in 0..50 {
                let run = Constants::for_run(&mut rng, loaded).last_name;
                let delta = run.abs_diff(loaded);
                assert!((65..=119).contains(&delta) && delta != 96 && delta != 112, "{loaded} {run}");
            }
        }
    }

    #[test]
    fn draws_stay_in_their_range_and_are_not_uniform() {
        let constants = Constants { last_name: 100, customer: 500, item: 4000 };
        for (items, customers) in [(100_000, 3000), (1000, 30), (5000, 150)] {
            let mut random = Random::new(7, constants);
            let mut seen = vec![0_u32; items as usize + 1];
            for _ in 0..50_000 {
                seen[random.item(items) as usize] += 1;
                assert!((1..=customers).contains(&random.customer(customers)));
            }
            let mut counts = seen.clone();
            counts.sort_unstable_by(|a, b| b.cmp(a));
            let hottest: u32 = counts[..counts.len() / 10].iter().sum();
            // Uniform draws would give the tenth that is drawn most little more than its share.
            assert!(hottest > 15_000, "{items} items: the hottest tenth has {hottest} of 50000 draws");
            assert_eq!(seen[0], 0);
        }
    }

    #[test]
    fn a_shrinks_with_its_range_and_stays_all_ones() {
        assert_eq!(shrunk(8191, 100_000, 100_000), 8191);
        assert_eq!(shrunk(8191, 10_000, 100_000), 511);
        assert_eq!(shrunk(255, 1000, 1000), 255);
        assert!((shrunk(1023, 30, 3000) + 1).is_power_of_two());
    }

    #[test]
    fn money_has_two_decimals_and_a_sign() {
        assert_eq!(
            (money(5), money(12_345), money(-1000)),
            ("0.05".into(), "123.45".into(), "-10.00".into())
        );
    }
}
