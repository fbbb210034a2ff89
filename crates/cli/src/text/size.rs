//! Formatting sizes in readable form.
//!
//! `qemu-img` and `qemu-io` print sizes in different styles. Each style has its functions.

/// A size in `qemu-img`'s style: up to three significant digits and a binary unit (`1.31 MiB`, `0.977 KiB`). Sizes of at
/// least 1000 units are printed in the next larger unit.
pub(crate) fn short(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && u128::from(bytes) >= 1000_u128 << (10 * unit) {
        unit += 1;
    }
    #[expect(clippy::cast_precision_loss, reason = "three digits are printed")]
    let value = bytes as f64 / (1_u64 << (10 * unit)) as f64;
    format!("{} {}B", significant(value), UNITS.get(unit).copied().unwrap_or_default())
}

/// A size in both forms, as `info` prints it: `1 GiB (1073741824 bytes)`.
pub(crate) fn both(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", short(bytes))
}

/// Three significant digits as C's `%0.3g` prints them; `value` is at least 0 and below 10000.
fn significant(value: f64) -> String {
    let decimals = if value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else if value >= 0.9995 || value == 0.0 {
        2
    } else {
        3
    };
    if value >= 999.5 {
        return exponent(value);
    }
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

fn exponent(value: f64) -> String {
    let text = format!("{:.2}", value / 1000.0);
    format!("{}e+03", text.trim_end_matches('0').trim_end_matches('.'))
}

/// A size, or a rate in bytes, in `qemu-io`'s style: `64 KiB`, `2.930 KiB`, `512 bytes`.
pub(crate) fn long(bytes: f64) -> String {
    const UNITS: [(&str, f64); 6] = [
        (" EiB", 1_152_921_504_606_846_976.0),
        (" PiB", 1_125_899_906_842_624.0),
        (" TiB", 1_099_511_627_776.0),
        (" GiB", 1_073_741_824.0),
        (" MiB", 1_048_576.0),
        (" KiB", 1024.0),
    ];
    let (text, unit) = match UNITS.iter().find(|(_, size)| bytes >= *size) {
        Some((unit, size)) => (format!("{:.3}", bytes / size), *unit),
        None => (format!("{bytes:.6}"), " bytes"),
    };
    let digits = match text.find(".000") {
        Some(point) => text.get(..point).unwrap_or_default(),
        None => &text,
    };
    format!("{digits}{unit}")
}

/// [`long`] for a whole number of bytes.
#[expect(clippy::cast_precision_loss, reason = "three decimals are printed")]
pub(crate) fn long_bytes(bytes: u64) -> String {
    long(bytes as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sizes_have_three_significant_digits() {
        let cases = [
            (0, "0 B"),
            (1, "1 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1023, "0.999 KiB"),
            (1024, "1 KiB"),
            (197_120, "192 KiB"),
            (1_376_256, "1.31 MiB"),
            (1_073_741_824, "1 GiB"),
            (1_048_064, "1 MiB"),
            (10_250_000, "9.78 MiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (bytes, expected) in cases {
            assert_eq!(short(bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn long_sizes_have_three_decimals_unless_they_are_zero() {
        assert_eq!(long_bytes(65536), "64 KiB");
        assert_eq!(long_bytes(3000), "2.930 KiB");
        assert_eq!(long_bytes(512), "512 bytes");
        assert_eq!(long_bytes(0), "0 bytes");
        assert_eq!(long(39.707_366), "39.707366 bytes");
    }
}
