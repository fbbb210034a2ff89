//! An image as bytes, to be corrupted at chosen offsets.

/// The bytes of an image file, with big-endian access.
#[derive(Clone, Debug)]
pub struct Image(Vec<u8>);

impl Image {
    /// Makes an image from these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// Returns the bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Truncates the file to `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.0.truncate(len);
    }

    /// Writes bytes at `offset`. The file grows if it is too short.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        if self.0.len() < end {
            self.0.resize(end, 0);
        }
        self.0[offset..end].copy_from_slice(bytes);
    }

    /// Writes a 32-bit number.
    pub fn put32(&mut self, offset: usize, value: u32) {
        self.put(offset, &value.to_be_bytes());
    }

    /// Writes a 64-bit number.
    pub fn put64(&mut self, offset: usize, value: u64) {
        self.put(offset, &value.to_be_bytes());
    }

    /// Reads a 64-bit number.
    pub fn get64(&self, offset: usize) -> u64 {
        let bytes = self.0[offset..offset + 8].try_into().expect("8 bytes");
        u64::from_be_bytes(bytes)
    }
}
