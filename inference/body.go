// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"io"
	"slices"
)

// Slice returns the part of b that s covers. It shares b's chunks; what lies outside of b is left out.
func (b Body) Slice(s Span) Body {
	c := cutter{chunks: b.Chunks}
	c.skipTo(s.Start)
	c.copyTo(s.End)
	var part Body
	for _, chunk := range c.out {
		part.Append(chunk)
	}
	return part
}

// Reader reads b. It is cheap to make, and readers do not disturb each other, as http.Request.GetBody asks.
func (b Body) Reader() io.ReadCloser { return &chunkReader{chunks: b.Chunks} }

// Member finds the value of a member of an object within b: of duplicates the last one's. It reads the whole object. False:
// there is no such member, or no object.
func (b Body) Member(of Span, name string) (value Span, ok bool) {
	c := newCursor(b.Slice(of).Chunks)
	if c.space() != '{' {
		return Span{}, false
	}
	c.enter()
	for o := (object{}); c.member(&o); {
		match := string(c.content(o.key)) == name
		start := c.offset()
		if c.value(); match {
			value, ok = Span{of.Start + start, of.Start + c.offset()}, true
		}
	}
	return value, ok && c.err == nil
}

// Field finds the value of a top-level field, as [Parse] does: of duplicates the last one's. Of an [Unknown] request it
// finds transfer fields only.
func (r *Request) Field(name string) (Span, bool) {
	var buf [maxKey]byte
	e := Edits{req: r}
	for _, m := range slices.Backward(e.recordsOf(r.scan.top.object)) {
		if string(content(buf[:], r.Body.Chunks, m.key)) == name {
			return m.value, true
		}
	}
	return Span{}, false
}

// A chunkReader reads chunks. It writes them out whole where it is asked to.
type chunkReader struct {
	chunks [][]byte
	at     int // in the first chunk
}

func (r *chunkReader) Read(p []byte) (int, error) {
	for len(r.chunks) > 0 {
		if rest := r.chunks[0][r.at:]; len(rest) > 0 {
			n := copy(p, rest)
			r.at += n
			return n, nil
		}
		r.chunks, r.at = r.chunks[1:], 0
	}
	return 0, io.EOF
}

func (r *chunkReader) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for len(r.chunks) > 0 {
		n, err := w.Write(r.chunks[0][r.at:])
		total += int64(n)
		r.at += n
		if err != nil {
			return total, err
		}
		r.chunks, r.at = r.chunks[1:], 0
	}
	return total, nil
}

func (r *chunkReader) Close() error {
	r.chunks = nil
	return nil
}
