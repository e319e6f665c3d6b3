// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	_ "embed"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The pages of the other engines, with the families that an endpoint picker reads and some that it must pass over. A
// value @key is the live value that vLLM's page calls key, or one of derivedNames; "histogram a b" is vLLM's histogram
// b under the name a.
var (
	//go:embed page_sglang.prom
	sglangPage string
	//go:embed page_trtllm.prom
	trtllmPage string
)

// Values of the other engines' pages that vLLM's has not, behind the captured ones in meter.values.
const (
	derivedUsedTokens = iota
	derivedThroughput // tokens per second since the start
	derivedHitRate
	derivedBootstrap
	derivedInflight
	derivedPrealloc
	derivedTransfer
	derivedCount
)

func derivedNames() []string {
	return []string{
		derivedUsedTokens: "derived:used_tokens", derivedThroughput: "derived:throughput", derivedHitRate: "derived:hit_rate",
		derivedBootstrap: "derived:bootstrap", derivedInflight: "derived:inflight", derivedPrealloc: "derived:prealloc",
		derivedTransfer: "derived:transfer",
	}
}

// derivedSlot is the place of a derived value in meter.values.
func derivedSlot(i int) int { return len(captured().index) + i }

// derive brings the derived values up to date. It needs process.mu.
func (p *process) derive() {
	m, s := &p.meter, metricSlots()
	set := func(i int, v float64) { m.values[derivedSlot(i)] = v }
	set(derivedUsedTokens, float64(p.cache.used()*p.cache.size))
	set(derivedThroughput, m.get(s.generationTokens)/max(time.Since(p.started).Seconds(), 1))
	set(derivedHitRate, m.get(s.prefixHits)/max(m.get(s.prefixQueries), 1))
	if p.e.opts.Engine == engineSGLang {
		bootstrap, inflight := 0, 0
		for g := range p.active {
			switch g.state {
			case stateBootstrap:
				bootstrap += len(g.seqs)
			case stateHandover:
				inflight += len(g.seqs)
			}
		}
		set(derivedBootstrap, float64(bootstrap))
		set(derivedInflight, float64(inflight))
	}
	set(derivedPrealloc, float64(p.deferred-p.fetching))
	set(derivedTransfer, float64(p.fetching))
}

// newEnginePage renders the static part of another engine's page.
func newEnginePage(k pageKey) *page {
	labels := `engine_type="` + k.mode + `",model_name="` + escapeLabel(k.model) + `"`
	source := trtllmPage
	if k.engine == engineSGLang {
		source = sglangPage
		labels += `,pp_rank="0",tp_rank="0"`
	}
	source = strings.NewReplacer("$labels", labels, "$block_size", strconv.Itoa(k.blockSize), "$num_blocks", strconv.Itoa(k.blocks)).Replace(source)
	pg := &page{}
	for line := range strings.Lines(source) {
		line = strings.TrimSuffix(line, "\n")
		switch words := strings.Fields(line); words[0] {
		case "#":
			pg.addHead(k, line)
		case "histogram":
			pg.families = append(pg.families, renamedHistogram(words[1], words[2], labels))
		default:
			name, prefix, value := splitSample(line)
			last := &pg.families[len(pg.families)-1]
			last.samples = append(last.samples, engineSample(name, prefix, value))
		}
	}
	pg.addPadding(k.padding)
	pg.nameSamples()
	return pg
}

func engineSample(name, prefix, value string) sample {
	s := sample{name: name, prefix: prefix, slot: fixedValue, fixed: value}
	if key, live := strings.CutPrefix(value, "@"); live {
		if i := slices.Index(derivedNames(), key); i >= 0 {
			s.slot = derivedSlot(i)
		} else {
			s.slot = captured().index[key] // a test proves that it is there
		}
	}
	return s
}

// renamedHistogram is a histogram of vLLM's page under another name and labels.
func renamedHistogram(name, source, labels string) family {
	h := captured().histogram(source)
	f := family{name: name, head: "# HELP " + name + " Histogram.\n# TYPE " + name + " histogram\n"}
	add := func(end, more string, slot int) {
		f.samples = append(f.samples, sample{name: name + end, prefix: name + end + "{" + labels + more + "} ", slot: slot})
	}
	for i, b := range h.bounds {
		add("_bucket", `,le="`+pythonFloat(b)+`"`, h.buckets[i])
	}
	add("_count", "", h.count)
	add("_sum", "", h.sum)
	return f
}
