"""From a name to tensors: finding and fetching checkpoint files, and reading, converting and writing what they hold.

Finding (`resolve`, `hub`) and looking (`headers`, `quantized_releases`) import no torch.
"""
