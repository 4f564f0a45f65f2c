//! Properties that hold for every codec.

use fastrand::Rng;
use proptest::prelude::*;

use super::*;

const CODECS: [Codec; 4] = [Codec::None, Codec::Float, Codec::Zstd, Codec::Gzip];
const ELEMENTS: [ElementType; 5] =
    [ElementType::Bytes, ElementType::F16, ElementType::Bf16, ElementType::F32, ElementType::F64];

/// What the bytes of a generated chunk are like.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Random,
    Constant,
    GaussianF32,
    GaussianBf16,
    GaussianF16,
    Spikes,
}

const KINDS: [Kind; 6] = [
    Kind::Random,
    Kind::Constant,
    Kind::GaussianF32,
    Kind::GaussianBf16,
    Kind::GaussianF16,
    Kind::Spikes,
];

/// A weight: normal, deviation 0.02, by Box and Muller.
fn weight(random: &mut Rng) -> f32 {
    let (radius, angle) = (1.0 - random.f32(), random.f32());
    0.02 * (-2.0 * radius.ln()).sqrt() * (std::f32::consts::TAU * angle).cos()
}

/// The upper half of a float32.
fn bf16(value: f32) -> [u8; 2] {
    let [_, _, low, high] = value.to_le_bytes();
    [low, high]
}

/// binary16 by truncation; what is too small for it becomes zero.
fn f16(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    let (sign, exponent) = ((bits >> 16) & 0x8000, (bits >> 23) & 0xff);
    let half = match exponent.checked_sub(112) {
        Some(exponent @ 1..=30) => sign | (exponent << 10) | ((bits >> 13) & 0x3ff),
        _ => sign,
    };
    let [low, high, ..] = half.to_le_bytes();
    [low, high]
}

fn chunk(kind: Kind, seed: u64, bytes: usize) -> Vec<u8> {
    let mut random = Rng::with_seed(seed);
    let mut raw = Vec::with_capacity(bytes + 8);
    while raw.len() < bytes {
        match kind {
            Kind::Random => raw.extend(random.u64(..).to_le_bytes()),
            Kind::Constant => raw.extend(seed.to_le_bytes()),
            Kind::GaussianF32 => raw.extend(weight(&mut random).to_le_bytes()),
            Kind::GaussianBf16 => raw.extend(bf16(weight(&mut random))),
            Kind::GaussianF16 => raw.extend(f16(weight(&mut random))),
            Kind::Spikes if random.u32(..1000) == 0 => raw.push(1),
            Kind::Spikes => raw.extend([0; 8]),
        }
    }
    raw.truncate(bytes);
    raw
}

/// Lengths that matter: tiny, odd, around a block of each width, anything.
fn chunk_bytes() -> impl Strategy<Value = usize> {
    let edges = (0_usize..4, 0_usize..5, 1_usize..3)
        .prop_map(|(log2, more, blocks)| (blocks << (17 + log2).min(19)) + more - 2);
    prop_oneof![2 => 0_usize..70, 2 => 70_usize..20_000, 2 => edges, 1 => 0_usize..600_000]
}

/// The stored bytes, or `None` for raw.
fn encode(codec: Codec, element: ElementType, raw: &[u8]) -> Option<Vec<u8>> {
    let mut stored = vec![0; raw.len()];
    match Encoder::new().encode(codec, element, raw, &mut stored).unwrap() {
        Encoded::Raw => None,
        Encoded::Stored(bytes) => {
            stored.truncate(bytes);
            Some(stored)
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_was_encoded_decodes_to_the_same_bytes(
        seed: u64, bytes in chunk_bytes(), kind in prop::sample::select(&KINDS[..]),
    ) {
        let raw = chunk(kind, seed, bytes);
        // One of each, kept: what one chunk leaves behind must not reach the next.
        let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new());
        for codec in CODECS {
            for element in ELEMENTS {
                let mut stored = vec![0xaa; raw.len()];
                let encoded = encoder.encode(codec, element, &raw, &mut stored).unwrap();
                let Encoded::Stored(stored_bytes) = encoded else { continue };
                prop_assert!(stored_bytes * 100 < raw.len() * 97);
                let mut back = vec![0x55; raw.len()];
                decoder.decode(codec, &stored[..stored_bytes], &mut back).unwrap();
                prop_assert!(back == raw, "{codec:?} {element:?}");
            }
        }
    }

    #[test]
    fn with_too_little_room_nothing_is_written_past_it(
        seed: u64, room_fraction in 0_usize..100, kind in prop::sample::select(&KINDS[..]),
        codec in prop::sample::select(&CODECS[1..]), element in prop::sample::select(&ELEMENTS[..]),
    ) {
        let raw = chunk(kind, seed, 10_000);
        let Some(whole) = encode(codec, element, &raw) else { return Ok(()) };
        let room_bytes = whole.len() * room_fraction / 100;
        let mut buffer = vec![0xaa; raw.len()];
        let (room, beyond) = buffer.split_at_mut(room_bytes);
        let encoded = Encoder::new().encode(codec, element, &raw, room).unwrap();
        prop_assert_eq!(encoded, Encoded::Raw);
        prop_assert!(beyond.iter().all(|byte| *byte == 0xaa));
    }

    #[test]
    fn garbage_is_an_error_or_the_right_length(
        garbage in prop::collection::vec(any::<u8>(), 0..400), raw_bytes in 0_usize..5000,
        width_log2 in 0_u8..4, log2 in 0_u8..22,
    ) {
        let mut headed = vec![1, 1 << width_log2, u8::from(width_log2 > 0), log2];
        headed.extend(u32::try_from(raw_bytes).unwrap().to_le_bytes());
        headed.extend(&garbage);
        let mut decoder = Decoder::new();
        for codec in CODECS {
            for stored in [&garbage, &headed] {
                // A slice cannot change its length: an `Ok` is the right one, or a panic came
                // first.
                let mut raw = vec![0; raw_bytes];
                let decoded = decoder.decode(codec, stored, &mut raw);
                let fits = stored.len() == raw_bytes;
                prop_assert!(codec != Codec::None || decoded.is_ok() == fits);
            }
        }
    }

    #[test]
    fn damaged_stored_bytes_never_panic_and_cut_ones_are_refused(
        seed: u64, kind in prop::sample::select(&KINDS[1..]), flips in 1_usize..4,
        codec in prop::sample::select(&CODECS[1..]), element in prop::sample::select(&ELEMENTS[..]),
    ) {
        let raw = chunk(kind, seed, 20_001);
        let Some(stored) = encode(codec, element, &raw) else { return Ok(()) };
        let (mut random, mut decoder) = (Rng::with_seed(seed), Decoder::new());
        let mut back = vec![0; raw.len()];

        for _ in 0..20 {
            let mut flipped = stored.clone();
            for _ in 0..flips {
                flipped[random.usize(..stored.len())] ^= 1 << random.u32(..8);
            }
            // Whether the content is right is for checksums to say.
            let _ = decoder.decode(codec, &flipped, &mut back);

            let cut = &stored[..random.usize(..stored.len())];
            prop_assert!(decoder.decode(codec, cut, &mut back).is_err());
        }
        let longer = [&stored[..], &[0]].concat();
        prop_assert!(decoder.decode(codec, &longer, &mut back).is_err());
        prop_assert!(decoder.decode(codec, &stored, &mut back[1..]).is_err());
        prop_assert!(decoder.decode(codec, &stored, &mut vec![0; raw.len() + 1]).is_err());
        // A decoder that met damage still works.
        decoder.decode(codec, &stored, &mut back).unwrap();
        prop_assert!(back == raw);
    }
}

#[test]
fn float_shrinks_weights_to_what_their_exponents_allow() {
    let fraction = |kind, element, percent_max: usize| {
        let raw = chunk(kind, 42, 4 << 20);
        let stored = encode(Codec::Float, element, &raw).expect("weights shrink");
        assert!(
            stored.len() * 100 <= raw.len() * percent_max,
            "{element:?}: {} of {} bytes",
            stored.len(),
            raw.len()
        );
    };
    fraction(Kind::GaussianBf16, ElementType::Bf16, 68);
    fraction(Kind::GaussianF16, ElementType::F16, 90);
    fraction(Kind::GaussianF32, ElementType::F32, 85);
}

#[test]
fn noise_is_left_raw_by_every_codec() {
    let raw = chunk(Kind::Random, 1, 1 << 20);
    for codec in CODECS {
        for element in ELEMENTS {
            assert_eq!(encode(codec, element, &raw), None, "{codec:?} {element:?}");
        }
    }
}

#[test]
fn a_chunk_counts_as_shrunk_only_below_the_fraction() {
    for (raw_bytes, stored_bytes) in [(0, 0), (1, 0), (2, 1), (100, 96), (101, 97), (4096, 3973)] {
        assert_eq!(stored_bytes_max(raw_bytes), stored_bytes);
    }
}

#[test]
fn ids_and_names_are_fixed_forever() {
    let fixed = [(0, "none"), (1, "float"), (2, "zstd"), (3, "gzip")];
    for (codec, (id, name)) in CODECS.into_iter().zip(fixed) {
        assert_eq!((codec.id(), codec.name(), Codec::from_id(id)), (id, name, Some(codec)));
    }
    assert!((4..=255).all(|id| Codec::from_id(id).is_none()));
}

#[test]
fn a_raw_chunk_of_another_length_is_refused() {
    let error = Decoder::new().decode(Codec::None, &[1, 2], &mut [0; 3]).unwrap_err();
    assert_eq!(error.to_string(), "a raw chunk of 3 bytes is expected, 2 bytes are stored");
}
