//! Reads FlatBuffers: tables, vectors, strings and bytes, by their place in the buffer.
//!
//! Nothing is parsed ahead, nothing is recursive, and every offset is checked where it is followed, so any bytes are
//! either read or refused. In a FlatBuffer many offsets may lead to one place, and a small buffer could so describe a
//! huge one. What is read is therefore counted, and all of it together may be a few times the buffer, not more.
//!
//! Layout (little-endian): at 0 the offset of the root table. A *table* starts with the signed distance back to its
//! *vtable*, which has its own size, the table's size, and for each field its place in the table (0: absent). A field of
//! a fixed size stands there; any other is an offset from its own place to a table, or to a *vector*: a count and then
//! the elements. Strings are vectors of bytes.

use std::cell::Cell;

use crate::error::{Error, Result};

/// How many times the buffer may be read in all: writers that share equal strings stay far below.
const READS_MAX: u64 = 4;
/// What reading a table counts at least: the smallest one has so many bytes.
const TABLE_BYTES_MIN: u64 = 8;

fn malformed(why: &str) -> Error {
    Error::malformed("zTOC", why)
}

/// A buffer, and how much more may be read from it.
#[derive(Debug)]
pub(super) struct Buffer<'b> {
    bytes: &'b [u8],
    left_bytes: Cell<u64>,
}

/// A table in a buffer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table<'r, 'b> {
    buffer: &'r Buffer<'b>,
    at: usize,
    /// Size in bytes, with the distance to the vtable.
    bytes: u16,
    /// The places of the fields.
    places: &'b [u8],
}

/// A vector of offsets in a buffer; empty where there is none.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vector<'r, 'b> {
    buffer: &'r Buffer<'b>,
    at: usize,
    len: usize,
}

impl<'b> Buffer<'b> {
    pub(super) fn new(bytes: &'b [u8]) -> Self {
        Self {
            bytes,
            left_bytes: Cell::new((bytes.len() as u64).saturating_mul(READS_MAX)),
        }
    }

    /// The root table.
    pub(super) fn root(&self) -> Result<Table<'_, 'b>> {
        self.table(self.follow(0)?)
    }

    fn get(&self, at: usize, bytes: usize) -> Result<&'b [u8]> {
        at.checked_add(bytes)
            .and_then(|end| self.bytes.get(at..end))
            .ok_or_else(|| malformed("something in it lies beyond its end"))
    }

    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        let array = self.get(at, N)?.first_chunk::<N>();
        array.copied().ok_or_else(|| malformed("it is cut short"))
    }

    fn count(&self, bytes: u64) -> Result<()> {
        let left = self.left_bytes.get().checked_sub(bytes);
        let left = left.ok_or_else(|| malformed("its parts are used again and again"))?;
        self.left_bytes.set(left);
        Ok(())
    }

    /// Where the offset at `at` leads.
    fn follow(&self, at: usize) -> Result<usize> {
        let offset = u32::from_le_bytes(self.array(at)?);
        // The reader of this program runs where addresses have 64 bits, or refuses here.
        usize::try_from(offset)
            .ok()
            .filter(|&offset| offset > 0)
            .and_then(|offset| at.checked_add(offset))
            .ok_or_else(|| malformed("an offset in it leads nowhere"))
    }

    fn table(&self, at: usize) -> Result<Table<'_, 'b>> {
        let back = i64::from(i32::from_le_bytes(self.array(at)?));
        let vtable = (at as u64)
            .checked_add_signed(-back)
            .and_then(|vtable| usize::try_from(vtable).ok())
            .ok_or_else(|| malformed("a vtable lies before its start"))?;
        let vtable_bytes = u16::from_le_bytes(self.array(vtable)?);
        let bytes = u16::from_le_bytes(self.array(vtable.saturating_add(2))?);
        if vtable_bytes < 4 || bytes < 4 {
            return Err(malformed("a table in it is shorter than its head"));
        }
        self.get(at, usize::from(bytes))?;
        self.count(TABLE_BYTES_MIN.max(u64::from(bytes)))?;
        let places = self
            .get(vtable, usize::from(vtable_bytes))?
            .get(4..)
            .unwrap_or_default();
        Ok(Table {
            buffer: self,
            at,
            bytes,
            places,
        })
    }

    /// The place and number of elements of the vector at `at`, whose elements have `element_bytes`.
    fn vector(&self, at: usize, element_bytes: usize) -> Result<(usize, usize)> {
        let len = u32::from_le_bytes(self.array(at)?) as usize;
        let bytes = len
            .checked_mul(element_bytes)
            .ok_or_else(|| malformed("a vector in it is too long"))?;
        self.get(at.saturating_add(4), bytes)?;
        self.count((bytes as u64).saturating_add(4))?;
        Ok((at.saturating_add(4), len))
    }

    fn bytes(&self, at: usize) -> Result<&'b [u8]> {
        let (at, len) = self.vector(at, 1)?;
        self.get(at, len)
    }
}

impl<'r, 'b> Table<'r, 'b> {
    /// Where field `number` stands, which has `bytes` bytes; nothing if it is absent.
    fn field(&self, number: usize, bytes: usize) -> Result<Option<usize>> {
        let place = self
            .places
            .get(number.saturating_mul(2)..)
            .and_then(|rest| rest.first_chunk::<2>());
        let place = usize::from(place.map_or(0, |place| u16::from_le_bytes(*place)));
        if place == 0 {
            return Ok(None);
        }
        if place < 4 || place + bytes > usize::from(self.bytes) {
            return Err(malformed("a field lies outside of its table"));
        }
        Ok(Some(self.at + place))
    }

    fn scalar<const N: usize>(&self, number: usize) -> Result<Option<[u8; N]>> {
        self.field(number, N)?.map(|at| self.buffer.array(at)).transpose()
    }

    /// A `byte`, or `default` where it is absent.
    pub(super) fn i8(&self, number: usize, default: i8) -> Result<i8> {
        Ok(self.scalar(number)?.map_or(default, i8::from_le_bytes))
    }

    /// An `int`, 0 where it is absent.
    pub(super) fn i32(&self, number: usize) -> Result<i32> {
        Ok(self.scalar(number)?.map_or(0, i32::from_le_bytes))
    }

    /// A `uint`, 0 where it is absent.
    pub(super) fn u32(&self, number: usize) -> Result<u32> {
        Ok(self.scalar(number)?.map_or(0, u32::from_le_bytes))
    }

    /// A `long`, 0 where it is absent.
    pub(super) fn i64(&self, number: usize) -> Result<i64> {
        Ok(self.scalar(number)?.map_or(0, i64::from_le_bytes))
    }

    /// A string or a vector of bytes, empty where it is absent.
    pub(super) fn bytes(&self, number: usize) -> Result<&'b [u8]> {
        match self.field(number, 4)? {
            Some(at) => self.buffer.bytes(self.buffer.follow(at)?),
            None => Ok(&[]),
        }
    }

    /// A table.
    pub(super) fn table(&self, number: usize) -> Result<Option<Table<'r, 'b>>> {
        match self.field(number, 4)? {
            Some(at) => self.buffer.table(self.buffer.follow(at)?).map(Some),
            None => Ok(None),
        }
    }

    /// A vector of tables or strings, empty where it is absent.
    pub(super) fn vector(&self, number: usize) -> Result<Vector<'r, 'b>> {
        let (at, len) = match self.field(number, 4)? {
            Some(at) => self.buffer.vector(self.buffer.follow(at)?, 4)?,
            None => (0, 0),
        };
        Ok(Vector {
            buffer: self.buffer,
            at,
            len,
        })
    }
}

impl<'r, 'b> Vector<'r, 'b> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn element(&self, number: usize) -> Result<usize> {
        if number >= self.len {
            return Err(malformed("an element beyond its vector"));
        }
        self.buffer.follow(self.at + number * 4)
    }

    /// Element `number` of a vector of tables.
    pub(super) fn table(&self, number: usize) -> Result<Table<'r, 'b>> {
        self.buffer.table(self.element(number)?)
    }

    /// Element `number` of a vector of strings.
    pub(super) fn bytes(&self, number: usize) -> Result<&'b [u8]> {
        self.buffer.bytes(self.element(number)?)
    }
}
