"""GPU kernels, one operation a folder, each beside its naive reference; import it as `hybrimoe_kt.kernels`.

Run from the repository's root, Python also finds this folder as top-level `kernels`, the name of an unrelated
package that Transformers probes for. Raising here would break `import transformers`; without a version the probe
takes it for absent.
"""
