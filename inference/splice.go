// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"cmp"
	"slices"
)

// A splice puts text in place of a span of the body.
type splice struct {
	Span
	text []byte
}

// build turns the edits into splices and these into chunks.
func (e *Edits) build() {
	if e.built {
		return
	}
	e.built = true
	e.splices = make([]splice, 0, 8) // not reused: a Reader may still be at work on the old chunks
	scan := &e.req.scan
	top, sampling := e.withSampling(), e.sampling
	if e.req.API == Unknown {
		top, sampling = nil, nil
	}
	e.editObject(scan.top, top)
	e.editObject(scan.sampling, sampling)
	for records := scan.records; len(records) > 0; {
		id := records[0].object
		if id != scan.top.object && id != scan.sampling.object {
			e.editObject(extent{object: id}, nil)
		}
		records = records[len(e.recordsOf(id)):]
	}
	if e.req.API != Unknown {
		for _, s := range slices.Backward(e.spans) { // at one place the first one counts
			e.splices = append(e.splices, s)
		}
	}
	// Outer splices come before those inside them, which then count for nothing.
	slices.SortStableFunc(e.splices, func(a, b splice) int {
		return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(b.End, a.End))
	})
	e.cut()
}

// withSampling returns the top level's edits and, where there is no object to hold them, one that adds those of
// sampling_params.
func (e *Edits) withSampling() []edit {
	if kind := e.req.scan.samplingKind; kind != 0 && kind != 'n' {
		return e.top
	}
	var value []byte
	for i := range e.sampling {
		if e.sampling[i].value != nil {
			value = appendField(value, &e.sampling[i], len(value) > 0)
		}
	}
	if value == nil || slices.ContainsFunc(e.top, func(x edit) bool { return x.name == samplingParamsKey }) {
		return e.top
	}
	value = append(append([]byte{'{'}, value...), '}')
	return append(slices.Clone(e.top), edit{name: samplingParamsKey, value: value})
}

// recordsOf returns the members of one object that were recorded.
func (e *Edits) recordsOf(object int) []record {
	records := e.req.scan.records
	byObject := func(r record, id int) int { return cmp.Compare(r.object, id) }
	i, _ := slices.BinarySearchFunc(records, object, byObject)
	j, _ := slices.BinarySearchFunc(records, object+1, byObject)
	return records[i:j]
}

// editObject replaces and removes members of one object and adds what it does not have.
func (e *Edits) editObject(at extent, edits []edit) {
	if at.object < 0 {
		return
	}
	for i := range edits {
		edits[i].done = false
	}
	left := e.editMembers(at, edits)
	var added []byte
	for i := range edits {
		if x := &edits[i]; !x.done && x.value != nil {
			added = appendField(added, x, left > 0 || added != nil)
		}
	}
	if added != nil {
		e.splices = append(e.splices, splice{Span{at.end, at.end}, added})
	}
}

// editMembers goes over the members of one object from the last to the first and returns how many stay.
func (e *Edits) editMembers(at extent, edits []edit) int {
	members := e.recordsOf(at.object)
	left := at.members - len(members)
	var first, last *record // of a run that goes
	for i := range slices.Backward(members) {
		m := &members[i]
		text, gone := e.fate(m, edits)
		if last != nil && (!gone || first.index != m.index+1) {
			e.splices = append(e.splices, splice{Span: run(first, last)})
			last = nil
		}
		if gone {
			if first = m; last == nil {
				last = m
			}
			continue
		}
		left++
		if text != nil {
			e.splices = append(e.splices, splice{m.value, text})
		}
	}
	if last != nil {
		e.splices = append(e.splices, splice{Span: run(first, last)})
	}
	return left
}

// fate says what becomes of a member, given that all behind it were asked about: a new value, or none.
func (e *Edits) fate(m *record, edits []edit) (text []byte, gone bool) {
	var buf [maxKey]byte
	key := content(buf[:], e.req.Body.Chunks, m.key)
	for i := range edits {
		if x := &edits[i]; x.name == string(key) {
			if x.value == nil || x.done {
				return nil, true
			}
			x.done = true
			return x.value, false
		}
	}
	return nil, e.strip && m.transfer
}

// run is what to cut for a run of neighbours: with the comma before it, or with the one after it at the object's
// beginning, or without any when nothing else is there.
func run(first, last *record) Span {
	switch {
	case first.index > 0:
		return Span{first.prevEnd, last.value.End}
	case last.next > 0:
		return Span{first.key.Start - 1, last.next}
	}
	return Span{first.key.Start - 1, last.value.End}
}

func appendField(dst []byte, x *edit, comma bool) []byte {
	if comma {
		dst = append(dst, ',')
	}
	if n, _ := plain([]byte(x.name)); n == len(x.name) {
		dst = append(append(append(dst, '"'), x.name...), '"')
	} else {
		dst = append(dst, quote(x.name)...)
	}
	dst = append(dst, ':')
	return append(dst, x.value...)
}

// cut lays the splices over the body's chunks.
func (e *Edits) cut() {
	body := e.req.Body
	e.size = body.Len
	if len(e.splices) == 0 {
		e.chunks = body.Chunks
		return
	}
	c := cutter{chunks: body.Chunks, out: make([][]byte, 0, len(body.Chunks)+2*len(e.splices))}
	done := 0
	for _, s := range e.splices {
		if s.Start < done {
			continue // inside the one before it
		}
		c.copyTo(s.Start)
		if len(s.text) > 0 {
			c.out = append(c.out, s.text)
		}
		c.skipTo(s.End)
		done = s.End
		e.size += len(s.text) - s.Len()
	}
	c.copyTo(body.Len)
	e.chunks = c.out
}

// A cutter goes over chunks from front to back.
type cutter struct {
	chunks [][]byte
	out    [][]byte
	at     int // in the first of chunks
	offset int // in the body
}

func (c *cutter) copyTo(offset int) { c.walk(offset, true) }
func (c *cutter) skipTo(offset int) { c.walk(offset, false) }

func (c *cutter) walk(offset int, keep bool) {
	for c.offset < offset && len(c.chunks) > 0 {
		piece := c.chunks[0][c.at:]
		if n := offset - c.offset; n < len(piece) {
			piece = piece[:n:n] // an append by a reader must not reach the body
			c.at += n
		} else {
			c.chunks, c.at = c.chunks[1:], 0
		}
		c.offset += len(piece)
		if keep && len(piece) > 0 {
			c.out = append(c.out, piece)
		}
	}
}
