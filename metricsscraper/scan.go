// SPDX-License-Identifier: Apache-2.0

package metricsscraper

import (
	"bytes"
	"math"
	"strconv"
	"strings"
)

// label is a name and a value.
type label struct{ name, value string }

// rawLabel is a label as it stands in the page, its value still escaped.
type rawLabel struct{ name, value []byte }

// reading is what one page said, reused from page to page. A count of 0 means that the page did not say.
type reading struct {
	sum  [signalCount]float64 // sum, or the largest value for sigBlockSize and sigNumBlocks
	n    [signalCount]int
	seen bool // any known family, also with NaN

	loraTime      float64   // Unix time of the newest sigLoRA series
	lora          [3][]byte // its max_lora, running and waiting lists, as bytes of their own
	awake, asleep bool

	labels  []rawLabel // scratch
	scratch []byte
}

// reset forgets the last page and keeps the memory.
func (r *reading) reset() {
	*r = reading{lora: r.lora, labels: r.labels, scratch: r.scratch}
	for i := range r.lora {
		r.lora[i] = r.lora[i][:0]
	}
}

// scan reads one page of Prometheus text or OpenMetrics, in one pass, allocating nothing once r has seen a page of
// the kind. Lines that are not wanted are not looked into; lines that cannot be read are left out.
func (t *table) scan(page []byte, r *reading) {
	r.reset()
	for len(page) > 0 {
		line := page
		if end := bytes.IndexByte(page, '\n'); end >= 0 {
			line, page = page[:end], page[end+1:]
		} else {
			page = nil
		}
		if len(line) < 3 || line[0] == '#' {
			continue
		}
		if line[0] == ' ' || line[0] == '\t' {
			line = bytes.TrimLeft(line, " \t")
		}
		name, rest := cutName(line)
		if t.lengths&(1<<min(len(name), 63)) == 0 {
			continue
		}
		if rules := t.families[string(name)]; rules != nil {
			t.series(rules, rest, r)
		}
	}
}

// cutName splits a line behind the metric's name. A brace behind a blank belongs to the value's exemplar.
func cutName(line []byte) (name, rest []byte) {
	end := bytes.IndexByte(line, '{')
	if end < 0 {
		end = len(line)
	}
	if blank := bytes.IndexByte(line[:end], ' '); blank >= 0 {
		end = blank
	}
	if tab := bytes.IndexByte(line[:end], '\t'); tab >= 0 {
		end = tab
	}
	return line[:end], line[end:]
}

// series reads labels and value of one line and counts them.
func (t *table) series(rules []rule, rest []byte, r *reading) {
	rest = skipBlanks(rest)
	r.labels = r.labels[:0]
	if len(rest) > 0 && rest[0] == '{' {
		var ok bool
		if rest, ok = r.parseLabels(rest[1:]); !ok {
			return
		}
		rest = skipBlanks(rest)
	}
	value, ok := parseValue(rest)
	if !ok {
		return
	}
	r.seen = true
	for _, rule := range rules {
		if r.matches(rule.labels) {
			t.count(rule.signal, value, r)
		}
	}
}

func skipBlanks(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	return b
}

// parseLabels fills r.labels from what stands behind the opening brace and returns what stands behind the closing one.
func (r *reading) parseLabels(b []byte) ([]byte, bool) {
	for {
		b = skipBlanks(b)
		if len(b) > 0 && b[0] == '}' {
			return b[1:], true
		}
		eq := bytes.IndexByte(b, '=')
		if eq <= 0 {
			return nil, false
		}
		name := bytes.TrimRight(b[:eq], " \t")
		b = skipBlanks(b[eq+1:])
		if len(b) == 0 || b[0] != '"' {
			return nil, false
		}
		end := endOfText(b[1:])
		if end < 0 {
			return nil, false
		}
		r.labels = append(r.labels, rawLabel{name, b[1 : 1+end]})
		b = skipBlanks(b[end+2:])
		if len(b) > 0 && b[0] == ',' {
			b = b[1:]
		} else if len(b) == 0 || b[0] != '}' {
			return nil, false
		}
	}
}

// endOfText is the index of the quote that ends an escaped text, or -1.
func endOfText(b []byte) int {
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '"':
			return i
		case '\\':
			i++
		}
	}
	return -1
}

// parseValue reads the number at the start of b; a timestamp or exemplar may follow.
func parseValue(b []byte) (float64, bool) {
	end := 0
	for end < len(b) && b[end] != ' ' && b[end] != '\t' && b[end] != '\r' {
		switch b[end] {
		case 'p', 'P', '_': // Go's own spellings, no exposition's
			return 0, false
		}
		end++
	}
	v, err := strconv.ParseFloat(string(b[:end]), 64) // stays on the stack: ParseFloat clones what its error keeps
	return v, err == nil
}

func (r *reading) matches(labels []label) bool {
	for _, l := range labels {
		if string(r.label(l.name)) != l.value {
			return false
		}
	}
	return true
}

// label is a label's value with escapes undone, valid until the next call; empty when the label is absent.
func (r *reading) label(name string) []byte {
	for _, l := range r.labels {
		if string(l.name) != name {
			continue
		}
		if bytes.IndexByte(l.value, '\\') < 0 {
			return l.value
		}
		r.scratch = r.scratch[:0]
		for i := 0; i < len(l.value); i++ {
			c := l.value[i]
			if c == '\\' && i+1 < len(l.value) {
				i++
				if c = l.value[i]; c == 'n' {
					c = '\n'
				}
			}
			r.scratch = append(r.scratch, c)
		}
		return r.scratch
	}
	return nil
}

// count adds one series' value. NaN, infinite and negative values are unknown.
func (t *table) count(sig signal, value float64, r *reading) {
	if math.IsNaN(value) || math.IsInf(value, 0) || value < 0 {
		return
	}
	switch sig {
	case sigBlockSize, sigNumBlocks:
		r.sum[sig] = max(r.sum[sig], value)
	case sigCacheInfo:
		r.largest(sigBlockSize, t.blockSizeLabel)
		r.largest(sigNumBlocks, t.numBlocksLabel)
	case sigLoRA:
		// Old label sets linger: the newest series counts.
		if r.n[sig] == 0 || value > r.loraTime {
			r.loraTime = value
			for i, name := range [...]string{"max_lora", "running_lora_adapters", "waiting_lora_adapters"} {
				r.lora[i] = append(r.lora[i][:0], r.label(name)...)
			}
		}
	case sigSleep:
		if awake := string(r.label("sleep_state")) == "awake"; value > 0 {
			r.awake, r.asleep = r.awake || awake, r.asleep || !awake
		}
	case sigKVUsage:
		if value > 1.01 { // a percentage, or nonsense
			return
		}
		r.sum[sig] += min(value, 1)
	default:
		r.sum[sig] += value
	}
	r.n[sig]++
}

// largest takes a number that stands in a label.
func (r *reading) largest(sig signal, name string) {
	if v, err := strconv.ParseFloat(string(r.label(name)), 64); err == nil && v > 0 && v <= math.MaxInt32 {
		r.sum[sig] = max(r.sum[sig], v)
		r.n[sig]++
	}
}

// adapters splits a comma-separated list; nil when nothing is in it.
func adapters(list []byte) []string {
	var out []string
	for name := range strings.SplitSeq(string(list), ",") {
		if name = strings.TrimSpace(name); name != "" {
			out = append(out, name)
		}
	}
	return out
}
