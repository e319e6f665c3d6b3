// SPDX-License-Identifier: Apache-2.0

package config

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// sample has every kind of field a plugin may use.
type sample struct {
	Threshold int64             `yaml:"threshold"`
	Small     int8              `yaml:"small"`
	Count     uint16            `json:"count"`
	Share     float64           `yaml:"share"`
	On        bool              `yaml:"on"`
	Interval  time.Duration     `yaml:"interval"`
	Size      int64             `yaml:"size,quantity"`
	Labels    map[string]string `yaml:"labels"`
	Names     []string
	Any       any
	Opt       *int             `yaml:"opt"`
	Inner     inner            `yaml:"inner"`
	List      []inner          `yaml:"list"`
	Raw       []Parameters     `yaml:"raw"`
	ByName    map[string]inner `yaml:"byName"`
	inner
	hidden int
}

type inner struct {
	Name string `yaml:"name"`
}

func TestParametersDecode(t *testing.T) {
	p, err := Parse("f.yaml", []byte(`
threshold: -5
count: 65535
share: 3
on: true
interval: 1m30s
size: 1.5Ki
labels: {a/b: c}
names: [x, "1"]
any: {k: [1, 2.5, null, true]}
opt: 0x10
inner: {name: a}
list: [{name: b}, {name: c}]
raw: [1, {z: 2}]
byName: {q: {name: d}}
name: embedded
`))
	if err != nil {
		t.Fatal(err)
	}
	got := sample{Small: 7, hidden: 1}
	if err := p.Decode(&got); err != nil {
		t.Fatal(err)
	}
	if len(got.Raw) != 2 || got.Raw[1].Line() != 14 {
		t.Errorf("raw %+v", got.Raw)
	}
	var z struct{ Z int }
	if err := got.Raw[1].Decode(&z); err != nil || z.Z != 2 {
		t.Errorf("raw decode %v %v", z, err)
	}
	got.Raw = nil
	want := sample{
		Threshold: -5, Small: 7, Count: 65535, Share: 3, On: true, Interval: 90 * time.Second, Size: 1536,
		Labels: map[string]string{"a/b": "c"}, Names: []string{"x", "1"},
		Any: map[string]any{"k": []any{uint64(1), 2.5, nil, true}}, Opt: new(16),
		Inner: inner{"a"}, List: []inner{{"b"}, {"c"}}, ByName: map[string]inner{"q": {"d"}}, inner: inner{"embedded"}, hidden: 1,
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(sample{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestParametersErrors(t *testing.T) {
	c, err := Load("f.yaml", []byte("apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n- type: a\n- type: b\n  parameters:\n    small: 128\n    count: -1\n    nmaes: []\n    raw: [{z: x}]\n    interval: 5\n"))
	if err != nil {
		t.Fatal(err)
	}
	absent, p := c.Plugins[0].Parameters, c.Plugins[1].Parameters
	var s sample
	if err := absent.Decode(&s); err != nil || !absent.Absent() {
		t.Error(err)
	}
	want := []string{
		"f.yaml:7: plugins[1].parameters.small: must be a whole number, is 128",
		"f.yaml:8: plugins[1].parameters.count: must be a whole number of 0 or more, is -1",
		"f.yaml:9: plugins[1].parameters.nmaes: unknown key, known here: threshold, small, count, share, on, interval, size, labels, names, any, opt, inner, list, raw, byName, name",
		"f.yaml:11: plugins[1].parameters.interval: must be a duration with a unit, such as 500ms or 2m, is 5",
	}
	if diff := cmp.Diff(want, strings.Split(p.Decode(&s).Error(), "\n")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	f := func(got error, want string) {
		t.Helper()
		if got.Error() != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	f(p.Errorf("raw[0].z", "%d is odd", 3), "f.yaml:10: plugins[1].parameters.raw[0].z: 3 is odd")
	f(p.Errorf("missing", "is required"), "f.yaml:7: plugins[1].parameters.missing: is required")
	f(p.Errorf("", "too short"), "f.yaml:7: plugins[1].parameters: too short")
	f(absent.Errorf("label", "is required"), "f.yaml:4: plugins[0].parameters.label: is required")
	f(Parameters{}.Errorf("label", "is required"), "label: is required")
	var unsupported struct{ C chan int }
	q, err := Parse("f", []byte("c: 1"))
	if err != nil {
		t.Fatal(err)
	}
	f(q.Decode(&unsupported), "f:1: c: type chan int cannot be configured")
}

func TestParseQuantity(t *testing.T) {
	f := func(s string, want int64, ok bool) {
		t.Helper()
		if got, gotOK := parseQuantity(s); got != want || gotOK != ok {
			t.Errorf("%s = %d %v, want %d %v", s, got, gotOK, want, ok)
		}
	}
	f("0", 0, true)
	f("64Mi", 64<<20, true)
	f("1.5Gi", 3<<29, true)
	f("5k", 5000, true)
	f("1G", 1e9, true)
	f("1e3", 1000, true)
	f("9223372036854775807", 1<<63-1, true)
	f("8Ei", 0, false)
	f("-1", 0, false)
	f("-1Mi", 0, false)
	f("0.5", 0, false)
	f("Mi", 0, false)
	f("", 0, false)
	f("NaN", 0, false)
	f("infMi", 0, false)
	f("1 Mi", 0, false)
	f("1m", 0, false)
}

func TestFormatDuration(t *testing.T) {
	f := func(d time.Duration, want string) {
		t.Helper()
		if got := formatDuration(d); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	f(2*time.Minute, "2m")
	f(time.Hour, "1h")
	f(90*time.Second, "1m30s")
	f(0, "0s")
	f(20*time.Second, "20s")
	f(10*time.Minute, "10m")
}
