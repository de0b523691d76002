//! Numbers that look random and are the same in every run.

/// xorshift64 (Marsaglia, "Xorshift RNGs", 2003), begun with any number but 0.
pub struct Chance(pub u64);

impl Default for Chance {
    fn default() -> Self {
        Chance(1)
    }
}

impl Chance {
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}
