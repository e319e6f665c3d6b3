// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	_ "embed"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// capturedPage is /metrics of a real vLLM 0.32 with NIXL. Every vllm: sample in it becomes a live value; what Python's
// runtime and the HTTP server report stays as it was captured, counts of requests at 0.
//
//go:embed page.prom
var capturedPage string

const (
	capturedLabels = `engine="0",`
	capturedModel  = `model_name="tiny"`
	loraFamily     = "vllm:lora_requests_info"
	cacheFamily    = "vllm:cache_config_info"
)

// pageKey is what makes two engines' pages the same but for their values.
type pageKey struct {
	engine            string // "" is vLLM
	mode              string // engine_type of the other engines: prefill, decode or unified
	model, generation string
	blockSize, blocks int
	maxLoRAs, padding int
	rank              int // data-parallel, the engine label
}

// page is a /metrics page with holes for values. Immutable.
type page struct{ families []family }

type family struct {
	name    string
	head    string // HELP and TYPE lines
	samples []sample
	names   []string // of its samples, each once
	dynamic bool     // rendered from the LoRA series
}

// has reports whether any of names is a sample of the family.
func (f *family) has(names []string) bool {
	for _, n := range f.names {
		if slices.Contains(names, n) {
			return true
		}
	}
	return false
}

// sample is one line. Its name is the sample's, so a histogram's differ.
type sample struct {
	name   string
	prefix string // the line up to its value and the blank
	slot   int    // index of the live value; fixedValue or startTime otherwise
	fixed  string // the value, for fixedValue
}

const (
	fixedValue = -1
	startTime  = -2
)

// line splits a sample line into name, everything before the value, and the value.
func splitSample(line string) (name, prefix, value string) {
	at := strings.LastIndexByte(line, ' ')
	prefix, value = line[:at+1], line[at+1:]
	name = prefix[:len(prefix)-1]
	if i := strings.IndexByte(name, '{'); i >= 0 {
		name = name[:i]
	}
	return name, prefix, value
}

// slotKey names a sample independently of engine and model: `vllm:x{reason="capacity"}`.
func slotKey(prefix string) string {
	k := strings.NewReplacer(capturedLabels, "", ","+capturedModel, "", capturedModel+",", "", capturedModel, "").Replace(prefix)
	return strings.TrimSuffix(strings.TrimSuffix(k, " "), "{}")
}

// slotTable maps slot keys to indexes, in the page's order.
type slotTable struct {
	index      map[string]int
	histograms map[string]*histogram
}

// histogram says where a histogram's cells lie.
type histogram struct {
	bounds     []float64
	buckets    []int
	count, sum int
}

// captured is the captured page as a table of slots.
var captured = sync.OnceValue(func() *slotTable {
	t := &slotTable{index: map[string]int{}, histograms: map[string]*histogram{}}
	for line := range strings.Lines(capturedPage) {
		line = strings.TrimSuffix(line, "\n")
		if line == "" || line[0] == '#' {
			continue
		}
		name, prefix, _ := splitSample(line)
		if !isLive(name) {
			continue
		}
		at := len(t.index)
		t.index[slotKey(prefix)] = at
		t.addHistogram(name, prefix, at)
	}
	return t
})

func isLive(name string) bool {
	return strings.HasPrefix(name, "vllm:") && !strings.HasSuffix(name, "_created") && name != cacheFamily
}

func (t *slotTable) addHistogram(name, prefix string, at int) {
	base, ok := strings.CutSuffix(name, "_bucket")
	if ok {
		_, rest, _ := strings.Cut(prefix, `le="`)
		bound, _, _ := strings.Cut(rest, `"`)
		v, err := strconv.ParseFloat(bound, 64)
		if err != nil {
			v = math.Inf(1)
		}
		h := t.histogram(base)
		h.bounds = append(h.bounds, v)
		h.buckets = append(h.buckets, at)
		return
	}
	if base, ok = strings.CutSuffix(name, "_count"); ok {
		t.histogram(base).count = at
	} else if base, ok = strings.CutSuffix(name, "_sum"); ok {
		t.histogram(base).sum = at
	}
}

func (t *slotTable) histogram(base string) *histogram {
	h := t.histograms[base]
	if h == nil {
		h = &histogram{}
		t.histograms[base] = h
	}
	return h
}

// newPage renders the static part of a page.
func newPage(k pageKey) *page {
	if k.engine != "" {
		return newEnginePage(k)
	}
	pg := &page{}
	table := captured()
	for line := range strings.Lines(capturedPage) {
		line = strings.TrimSuffix(line, "\n")
		if line == "" {
			continue
		}
		if line[0] == '#' {
			pg.addHead(k, line)
			continue
		}
		name, prefix, value := splitSample(line)
		s := sample{name: name, prefix: k.rewrite(prefix), slot: fixedValue, fixed: value}
		switch {
		case isLive(name):
			s.slot = table.index[slotKey(prefix)]
		case strings.HasSuffix(name, "_created"):
			s.slot = startTime
		case strings.HasPrefix(name, "http_"):
			s.fixed = "0.0"
		}
		s.name = k.oldName(name)
		last := &pg.families[len(pg.families)-1]
		last.samples = append(last.samples, s)
	}
	pg.families = k.dropUnknown(pg.families)
	pg.addPadding(k.padding)
	pg.nameSamples()
	return pg
}

// nameSamples fills the families' lists of names.
func (pg *page) nameSamples() {
	for i := range pg.families {
		f := &pg.families[i]
		if f.dynamic {
			f.names = []string{f.name}
		}
		for _, s := range f.samples {
			if !slices.Contains(f.names, s.name) {
				f.names = append(f.names, s.name)
			}
		}
	}
}

func (pg *page) addHead(k pageKey, line string) {
	name := k.oldName(strings.Fields(line)[2])
	if n := len(pg.families); n > 0 && pg.families[n-1].name == name {
		pg.families[n-1].head += k.oldName(line) + "\n"
		return
	}
	if name == cacheFamily && k.maxLoRAs > 0 {
		pg.families = append(pg.families, family{
			name: loraFamily, dynamic: true,
			head: "# HELP " + loraFamily + " Running stats on lora requests.\n# TYPE " + loraFamily + " gauge\n",
		})
	}
	pg.families = append(pg.families, family{name: name, head: k.oldName(line) + "\n"})
}

// rewrite puts the engine's model and cache configuration in the place of the captured ones.
func (k pageKey) rewrite(prefix string) string {
	out := strings.Replace(prefix, capturedModel, `model_name="`+escapeLabel(k.model)+`"`, 1)
	if strings.HasPrefix(out, cacheFamily) {
		out = setLabel(out, "block_size", strconv.Itoa(k.blockSize))
		out = setLabel(out, "effective_attention_block_size", strconv.Itoa(k.blockSize))
		out = setLabel(out, "num_gpu_blocks", strconv.Itoa(k.blocks))
		out = setLabel(out, "num_gpu_blocks_override", strconv.Itoa(k.blocks))
		out = setLabel(out, "kv_cache_size_tokens", strconv.Itoa(k.blocks*k.blockSize))
	}
	if k.rank > 0 {
		out = strings.Replace(out, capturedLabels, `engine="`+strconv.Itoa(k.rank)+`",`, 1)
	}
	if k.generation == generationOld {
		out = strings.Replace(k.oldName(out), capturedLabels, "", 1)
	}
	return out
}

// oldName gives a family the name it had in the old generation.
func (k pageKey) oldName(s string) string {
	if k.generation != generationOld {
		return s
	}
	return strings.NewReplacer("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc",
		"vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds").Replace(s)
}

// dropUnknown removes the families that the old generation did not have.
func (k pageKey) dropUnknown(all []family) []family {
	if k.generation != generationOld {
		return all
	}
	var kept []family
	for _, f := range all {
		newer := false
		for _, p := range []string{"vllm:num_requests_waiting_by_reason", "vllm:num_requests_kv_fetch", "vllm:nixl_", "vllm:admission_", "vllm:engine_sleep", "vllm:prompt_tokens_"} {
			newer = newer || (strings.HasPrefix(f.name, p) && f.name != "vllm:prompt_tokens_total")
		}
		if !newer {
			kept = append(kept, f)
		}
	}
	return kept
}

// addPadding appends made-up histograms of at least n bytes.
func (pg *page) addPadding(n int) {
	for i := 0; n > 0; i++ {
		name := "padding_seconds_" + strconv.Itoa(i)
		f := family{name: name, head: "# HELP " + name + " Padding.\n# TYPE " + name + " histogram\n"}
		n -= len(f.head)
		for b := range 40 {
			s := sample{name: name + "_bucket", prefix: name + `_bucket{le="` + strconv.Itoa(b) + `.0"} `, slot: fixedValue, fixed: "0.0"}
			f.samples = append(f.samples, s)
			n -= len(s.prefix) + 4
		}
		pg.families = append(pg.families, f)
	}
}

func setLabel(line, name, value string) string {
	for _, before := range []string{"{", ","} {
		head, rest, ok := strings.Cut(line, before+name+`="`)
		if ok {
			_, tail, _ := strings.Cut(rest, `"`)
			return head + before + name + `="` + value + `"` + tail
		}
	}
	return line
}

func escapeLabel(s string) string {
	return strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s)
}
