//! Disk geometry: cylinders, heads and sectors per track.
//!
//! Spec: Virtual Hard Disk Image Format Specification, appendix "CHS Calculation". Virtual PC presents a disk of cylinders
//! × heads × sectors to the guest. So the size of a disk of Virtual PC is such a product.

/// Number of sectors of [`Geometry::LARGEST`].
pub(super) const MAX_SECTORS: u64 = 65_535 * 16 * 255;
/// If a disk has this number of sectors or more, a track has 255 sectors.
const LARGE: u64 = 65_535 * 16 * 63;

/// A geometry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) cylinders: u16,
    pub(super) heads: u8,
    pub(super) sectors: u8,
}

impl Geometry {
    /// The largest geometry.
    pub(super) const LARGEST: Self = Self { cylinders: 65_535, heads: 16, sectors: 255 };

    /// The geometry that the specification gives to a disk with `sectors` sectors. The product of the geometry
    /// may be smaller than `sectors`.
    pub(super) fn below(sectors: u64) -> Self {
        let total = sectors.min(MAX_SECTORS);
        let (mut track, mut heads);
        if total >= LARGE {
            (track, heads) = (255, 16);
        } else {
            track = 17;
            heads = (total / track).div_ceil(1024).max(4);
            if total / track >= heads * 1024 || heads > 16 {
                (track, heads) = (31, 16);
            }
            if total / track >= heads * 1024 {
                (track, heads) = (63, 16);
            }
        }
        Self {
            cylinders: u16::try_from(total / track / heads).unwrap_or(u16::MAX),
            heads: u8::try_from(heads).unwrap_or(16),
            sectors: u8::try_from(track).unwrap_or(255),
        }
    }

    /// The geometry that QEMU chooses for at least `sectors` sectors, or the largest geometry if no geometry has so many
    /// sectors.
    pub(super) fn holding(sectors: u64) -> Self {
        if sectors == 0 {
            return Self { cylinders: 0, heads: 0, sectors: 0 };
        }
        // `n` minus the product of `below(n)` is less than two cylinders, so this number of candidates is sufficient.
        let candidates = (sectors..MAX_SECTORS).take(2 * 16 * 255);
        let mut geometries = candidates.map(Self::below);
        geometries.find(|geometry| geometry.product() >= sectors).unwrap_or(Self::LARGEST)
    }

    /// Number of sectors.
    pub(super) fn product(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holding(bytes: u64) -> (u16, u8, u8) {
        let geometry = Geometry::holding(bytes / 512);
        assert!(geometry == Geometry::LARGEST || geometry.product() * 512 >= bytes);
        (geometry.cylinders, geometry.heads, geometry.sectors)
    }

    #[test]
    fn geometries_are_the_same_as_in_qemu_img() {
        assert_eq!(holding(0), (0, 0, 0));
        assert_eq!(holding(512), (1, 4, 17));
        assert_eq!(holding(64 << 10), (2, 4, 17));
        assert_eq!(holding(8 << 20), (0xf1, 4, 17));
        assert_eq!(holding(511 << 20), (0x40f, 16, 63));
        assert_eq!(holding(8 << 30), (0x4105, 16, 63));
        assert_eq!(holding(127 << 30), (0xfeff, 16, 255));
        assert_eq!(holding(128 << 30), (0xffff, 16, 255));
        assert_eq!(holding(u64::MAX), (0xffff, 16, 255));
    }

    #[test]
    fn every_size_up_to_the_largest_has_a_geometry_that_holds_it() {
        for shift in 0..40 {
            for step in 0..16_u64 {
                let sectors = (1 << shift) + (step << shift) / 16;
                let geometry = Geometry::holding(sectors);
                let holds = geometry.product() >= sectors;
                assert!(holds || sectors >= MAX_SECTORS - 4080, "{sectors}: {geometry:?}");
            }
        }
    }
}
